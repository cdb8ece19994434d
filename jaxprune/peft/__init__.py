"""Exchange adapters with Hugging Face PEFT: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Pruned adapters have a rank of their own at every site. They are written with the scale folded into A and alpha = rank
everywhere, so that s = alpha / r = 1 for every reader, also for those that know only the global alpha and r. A folder holds
LoRA or DoRA; other kinds of adapters are written as the LoRA that does the same, where there is one. What is no change of a
kernel, such as a bottleneck, has a format of its own (`save_adapters`).
"""

from jaxprune.peft.load import load_peft as load_peft
from jaxprune.peft.names import TorchPaths as TorchPaths
from jaxprune.peft.own import load_adapters as load_adapters
from jaxprune.peft.own import save_adapters as save_adapters
from jaxprune.peft.resizing import Resized as Resized
from jaxprune.peft.resizing import resize as resize
from jaxprune.peft.save import save_peft as save_peft
