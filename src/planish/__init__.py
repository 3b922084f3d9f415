"""planish: make large language models smaller and faster without training them.

`import planish` registers the classes of compressed models, so that `AutoModelForCausalLM.from_pretrained` loads them.
"""

from planish.modelling import register
from planish.version import __version__

__all__ = ["__version__"]

register()
