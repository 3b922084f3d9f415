"""planish: make large language models smaller and faster without training them.

`import planish` registers the classes of compressed models, so that `AutoModelForCausalLM.from_pretrained` loads them.

    result = planish.compress("owner/model", keep=0.8, output="smaller")       # or without output: the smaller model
    model = planish.load("smaller")
    print(planish.evaluate("smaller", "wikitext2").perplexity)
"""

import sys
from pathlib import Path

from planish.version import __version__


def _is_command() -> bool:
    """Whether this process is the `planish` command, whose help must not wait for torch and transformers."""
    program = sys.argv[0] if sys.argv else ""
    return Path(program).stem == "planish" or (program == "-m" and "planish" in sys.orig_argv)


if not _is_command():
    from planish.api import (
        answer_both,
        ask,
        compare,
        compress,
        eora,
        evaluate,
        evaluate_tasks,
        forecast,
        load,
        measure_effects,
    )

__all__ = [
    "__version__", "answer_both", "ask", "compare", "compress", "eora", "evaluate", "evaluate_tasks", "forecast", "load",
    "measure_effects",
]  # fmt: skip
