"""One task in two forms: do the model's circuits for them share edges?

    python benchmarks/case_study.py [--model …] [--task …] [--forms …] [--steps …] [--out …]

After Bhaskar et al. 2024, section 5, which uses Boolean expressions by instruction and by few-shot
on CodeLlama-13B. SmolLM2-135M, the default here, can do hypernymy in both forms. The folder holds:

1. accuracies.csv: how often the model is right, for each task and form of --look.
2. {form}.safetensors: a ranking of all edges, trained on queries that the model answers correctly
   in every form; all forms use the same training and held-out queries. {form}-again: the same with
   another seed (for --again), to show how much runs share that differ only in the seed.
3. sizes.csv: each ranking's circuits on its own form's held-out prompts.
4. circuits/: a circuit per form with --n-edges edges, their intersection and their union.
   table.csv: each of them, and a random one, on each form's held-out prompts.
   overlap.csv: how many edges two rankings' circuits of one size share.
5. explained/: what the highest-ranked edges of each form's circuit do (tl_edgeprune.explain).
   case-study.png: sizes and overlaps.

Finished parts are not repeated, so a killed run continues if started with the same arguments. With
the paper's model and task, for a GPU with 80 GB:

    python benchmarks/case_study.py --model codellama/CodeLlama-13b-Instruct-hf \\
        --task boolean-expressions --look boolean-expressions --dtype bfloat16 --recompute \\
        --depth 3 --pairs 4000 --held-out 400 --steps 3000 --n-edges 1500 --out runs/case-study-13b
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch

from tl_edgeprune import Circuit, EdgePruner, Task, explain, models, tasks
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.evaluation.evaluate import evaluate_all
from tl_edgeprune.report.figures import saved_figure
from tl_edgeprune.report.palette import MUTED
from tl_edgeprune.report.plots.axes import log_axis
from tl_edgeprune.tasks.answer_logits import logit_diff
from tl_edgeprune.tasks.solved import is_right
from tl_edgeprune.utils.writing import write_whole

SIZES = (100, 200, 500, 1000, 2000, 5000, 10_000, 20_000)
FIGURES = ("n_edges", "n_alive", "kl", "kl_sem", "exact_match", "accuracy", "logit_diff")
FIGURES += ("logit_diff_full", "logit_diff_empty", "faithfulness", "n_pairs")
FORMS = ("instruction", "few-shot")


def main() -> None:
    options = parser().parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    out: Path = options.out or Path("runs") / f"case-study-{options.task}"
    out.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, options.dtype)
    model = models.load(options.model, device=options.device, dtype=dtype)
    accuracies(model, options, out / "accuracies.csv")
    pairs = solved_in_every_form(model, options, out)
    train, held_out, trained = {}, {}, {}
    for form, task in pairs.items():
        train[form], held_out[form] = task.split(1 - options.held_out / len(task), options.seed)
        say(f"{form}: {len(train[form])} pairs to train on, {len(held_out[form])} held out.")
        trained[form] = ranking(model, train[form], form, options.seed, options, out)
    sizes(model, trained, held_out, out / "sizes.csv")
    circuits = chosen(trained, options, out / "circuits")
    table(model, circuits, held_out, out)
    explained(model, trained, circuits, held_out, options, out / "explained")
    again = {
        f"{form}-again": ranking(
            model, train[form], f"{form}-again", options.seed + 1, options, out
        )
        for form in options.again
    }
    table(model, {k: v.top(options.n_edges) for k, v in again.items()}, held_out, out)
    overlap(trained | again, out / "overlap.csv")
    draw(out)


# ------------------------------------------------------------------------------------ the prompts


def load(model: Any, name: str, form: str, n: int, options: argparse.Namespace) -> Task:
    own = {"depth": options.depth} if name == "boolean-expressions" else {}
    return tasks.load(name, model, n, options.seed, form=form, **own)


def accuracies(model: Any, options: argparse.Namespace, path: Path) -> None:
    """How often the model is right in each form, over all prompts and per answer."""
    done = {(row["task"], row["form"]) for row in rows(path)}
    for name in options.look:
        for form in options.forms:
            if (name, form) in done:
                continue
            task = load(model, name, form, options.look_pairs, options)
            right, over = answered(model, task)
            answers = torch.stack([answer[0] for answer in task.answers])
            each = [float(right[answers == answer].mean()) for answer in answers.unique()]
            row = {"task": name, "form": form, "n_pairs": len(task), "right": float(right.mean())}
            row |= {"right_mean_over_answers": sum(each) / len(each), "n_answers": len(each)}
            row |= {"right_answer_with_fewest": min(each)}
            row["over_distractor"] = over
            prompt = model.tokenizer.decode(task.clean[0])
            add(path, row | {"prompt": prompt, "answer": model.tokenizer.decode(task.answers[0])})
            say(row)


def answered(model: Any, task: Task) -> tuple[torch.Tensor, float]:
    """Whether the model is right on each prompt, and the share of prompts on which the answer's
    logit is above the distractor's (chance: 0.5).
    """
    right, over = torch.zeros(len(task)), 0
    for batch in task.batches(16):
        batch = batch.to(next(model.parameters()).device)
        with torch.no_grad():
            last = model(batch.clean)[:, -1:]
        right[batch.indices.cpu()] = is_right(last, batch).float().cpu()
        over += int((logit_diff(last, batch) > 0).sum())
    return right, over / len(task)


def solved_in_every_form(model: Any, options: argparse.Namespace, out: Path) -> dict[str, Task]:
    """The task in each form, without queries that the model gets wrong in any form."""
    n = options.pairs
    found = {form: load(model, options.task, form, n, options) for form in options.forms}
    path = out / "solved.json"
    if not path.exists():
        right = {form: tasks.solved(model, task).tolist() for form, task in found.items()}
        write_whole(path, json.dumps(right).encode())
    right = json.loads(path.read_text())
    kept = [i for i in range(n) if all(right[form][i] for form in options.forms)]
    say(f"{len(kept)} of {n} queries are done right in every form.")
    return {form: task.subset(kept) for form, task in found.items()}


# ----------------------------------------------------------------------------------- the circuits


def ranking(
    model: Any, train: Task, name: str, seed: int, options: argparse.Namespace, out: Path
) -> EdgeScores:
    """Log alphas of all edges, from one run with sampled budgets."""
    path, checkpoint = out / f"{name}.safetensors", out / f"{name}.checkpoint"
    if path.exists():
        return EdgeScores.load(path)
    pruner = EdgePruner(
        steps=options.steps,
        batch_size=options.batch_size,
        recompute=options.recompute,
        seed=seed,
        checkpoint=checkpoint,
        checkpoint_every=5,
        progress=options.progress,
    )
    started = time.monotonic()
    result = pruner.fit(model, train, resume=checkpoint if checkpoint.exists() else None)
    if not result.finished:
        raise SystemExit(f"{name}: stopped early; the same command goes on.")
    history = [[round(step["loss"], 4), round(step["target"])] for step in result.history]
    write_whole(out / f"{name}-history.json", json.dumps(history).encode())
    result.scores.save(path)
    checkpoint.unlink()
    say(f"{name}: trained, {(time.monotonic() - started) / 60:.1f} minutes.")
    return result.scores


def sizes(
    model: Any, trained: dict[str, EdgeScores], held_out: dict[str, Task], path: Path
) -> None:
    """Each ranking's circuits on its own form's held-out prompts."""
    done = {row["form"] for row in rows(path)}
    for form, scores in trained.items():
        if form in done:
            continue
        wanted = [size for size in SIZES if size < scores.graph.n_edges]
        found = evaluate_all(model, [scores.top(k) for k in wanted], held_out[form])
        for evaluation in found:
            add(path, {"form": form} | figures(evaluation))
        say(f"{form}: evaluated at {len(wanted)} sizes.")


def chosen(
    trained: dict[str, EdgeScores], options: argparse.Namespace, folder: Path
) -> dict[str, Circuit]:
    """A circuit per form, their intersection, their union, and a random control."""
    found = {form: scores.top(options.n_edges) for form, scores in trained.items()}
    first, *others = found.values()
    intersection = union = first
    for other in others:
        intersection, union = intersection & other, union | other
    found |= {"intersection": intersection, "union": union}
    folder.mkdir(exist_ok=True)
    for name, circuit in found.items():
        circuit.save(folder / f"{name}.json")
    generator = torch.Generator().manual_seed(options.seed)
    noise = torch.rand(first.graph.n_edges, generator=generator)
    found["random"] = Circuit.top(first.graph, noise, options.n_edges, **first.metadata)
    return found


def table(model: Any, circuits: dict[str, Circuit], held_out: dict[str, Task], out: Path) -> None:
    """Every circuit on every form's held-out prompts."""
    path = out / "table.csv"
    done = {(row["prompts"], row["circuit"]) for row in rows(path)}
    for form, task in held_out.items():
        missing = [name for name in circuits if (form, name) not in done]
        found = evaluate_all(model, [circuits[name] for name in missing], task)
        for name, evaluation in zip(missing, found, strict=True):
            add(path, {"prompts": form, "circuit": name} | figures(evaluation))
        say(f"{form}: {len(missing)} circuits evaluated.")


def overlap(trained: dict[str, EdgeScores], path: Path) -> None:
    """How many edges two rankings' circuits of one size share, and two random ones would."""
    path.unlink(missing_ok=True)
    for one, two in itertools.combinations(trained, 2):
        for size in (size for size in SIZES if size < trained[one].graph.n_edges):
            a, b = trained[one].top(size), trained[two].top(size)
            names = set(a.nodes), set(b.nodes)
            row = {"one": one, "two": two, "size": size, "shared": (a & b).n_edges}
            row |= {"iou": round(a.iou(b), 5), "by_chance": round(size**2 / a.graph.n_edges, 2)}
            row |= {"nodes_one": len(names[0]), "nodes_two": len(names[1])}
            add(path, row | {"shared_nodes": len(names[0] & names[1])})


def explained(
    model: Any,
    trained: dict[str, EdgeScores],
    circuits: dict[str, Circuit],
    held_out: dict[str, Task],
    options: argparse.Namespace,
    folder: Path,
) -> None:
    """The highest-ranked edges of each form's circuit, one by one."""
    for form in options.forms:
        path = folder / f"{form}.json"
        if path.exists():
            continue
        few = trained[form].top(min(options.explain, options.n_edges)).edges
        found = explain(model, circuits[form], held_out[form][: options.explain_pairs], edges=few)
        found.save(path)
        found.save(path.with_suffix(".csv"))
        say(f"{form}: {len(few)} edges explained.")


# ------------------------------------------------------------------------------------- the picture


def draw(out: Path) -> None:
    """Plots the quality of each form's circuits and the edges that they share against size."""
    sizes, shared = rows(out / "sizes.csv"), rows(out / "overlap.csv")
    forms = list(dict.fromkeys(row["form"] for row in sizes))
    with saved_figure(out / "case-study.png", 10.5, 3.2, dpi=100) as figure:
        left, middle, right = figure.subplots(1, 3)
        for form in forms:
            own = [row for row in sizes if row["form"] == form]
            edges = [int(row["n_edges"]) for row in own]
            left.plot(edges, [float(row["kl"]) for row in own], "o-", ms=4, label=form)
            match = [100 * float(row["exact_match"]) for row in own]
            middle.plot(edges, match, "o-", ms=4, label=form)
        left.set(ylabel="KL to the full model, nats", ylim=(0, None))
        middle.set(ylabel="exact match, %", ylim=(0, 102))
        left.legend()
        for one, two in dict.fromkeys((row["one"], row["two"]) for row in shared):
            own = [row for row in shared if (row["one"], row["two"]) == (one, two)]
            edges = [int(row["size"]) for row in own]
            share = [100 * int(row["shared"]) / int(row["size"]) for row in own]
            style = "o--" if two == f"{one}-again" else "o-"
            label = f"{one}, two seeds" if two == f"{one}-again" else f"{one}, {two}"
            if two == f"{one}-again" or not two.endswith("-again"):
                right.plot(edges, share, style, ms=4, label=label)
        chance = [100 * float(row["by_chance"]) / int(row["size"]) for row in own]
        right.plot(edges, chance, ":", color=MUTED, label="by chance")
        right.set(ylabel="edges shared, %", ylim=(0, 100))
        right.legend(fontsize=9)
        for axes in (left, middle, right):
            axes.set_xlabel("edges kept")
            log_axis(axes, "x", edges)
        figure.tight_layout()


# -------------------------------------------------------------------------------------- bookkeeping


def figures(evaluation: Any) -> dict[str, Any]:
    found = evaluation.to_dict()
    return {k: round(found[k], 5) if isinstance(found[k], float) else found[k] for k in FIGURES}


def rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def add(path: Path, row: dict[str, Any]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def say(what: Any) -> None:
    print(time.strftime("%H:%M:%S"), what, flush=True)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_option = found.add_argument
    add_option("--model", default="smollm2-135m", help="a name of models.load")
    add_option("--task", default="hypernymy", help="a task with these forms")
    add_option("--forms", nargs="+", default=list(FORMS))
    add_option("--look", nargs="*", default=["boolean-expressions", "hypernymy"], metavar="TASK")
    add_option("--look-pairs", type=int, default=96, help="prompts per form (default: 96)")
    add_option(
        "--depth", type=int, default=2, help="nesting depth of Boolean expressions (default: 2)"
    )
    add_option("--pairs", type=int, default=256, help="queries before unsolved ones are dropped")
    add_option("--held-out", type=int, default=64)
    add_option("--n-edges", type=int, default=1000, help="size of each form's circuit")
    add_option("--steps", type=int, default=150)
    add_option("--again", nargs="*", default=[], metavar="FORM")
    add_option("--explain", type=int, default=40, help="edges to explain per circuit (default: 40)")
    add_option("--explain-pairs", type=int, default=8)
    add_option("--batch-size", type=int, default=8)
    add_option("--recompute", action="store_true", help="recompute blocks in backward: less memory")
    add_option("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add_option("--device", default=None, help="default: CUDA if available, else the CPU")
    add_option("--threads", type=int, default=None, help="default: torch's")
    add_option("--seed", type=int, default=0)
    add_option("--progress", action="store_true")
    add_option("--out", type=Path, default=None, help="default: runs/case-study-{task}")
    return found


if __name__ == "__main__":
    main()
