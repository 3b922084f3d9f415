"""planish: make large language models smaller and faster without training them.

`import planish` registers the classes of compressed models, so that `AutoModelForCausalLM.from_pretrained` loads them.
"""

from planish.modelling import register

__version__ = "0.1.0"

register()
