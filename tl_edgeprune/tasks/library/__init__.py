"""The built-in tasks, one file each. Importing this package registers them."""

from tl_edgeprune.tasks.library import (  # noqa: F401
    arithmetic,
    boolean_expressions,
    capitals,
    docstring,
    gendered_pronoun,
    greater_than,
    hypernymy,
    induction,
    ioi,
    mcqa,
    subject_verb_agreement,
    tracr,
)
