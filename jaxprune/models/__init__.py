"""Encoder classifiers in Flax Linen and their conversion from Hugging Face checkpoints.

The models are ordinary Linen modules: they know nothing of adapters, masks or methods. `transformers` and
`huggingface_hub` are imported when a checkpoint is looked up, never by importing this package.
"""

from jaxprune.models.config import EncoderConfig as EncoderConfig
from jaxprune.models.convert import classifier_torch_paths as classifier_torch_paths
from jaxprune.models.encoder import SequenceClassifier as SequenceClassifier
from jaxprune.models.gguf import Gguf as Gguf
from jaxprune.models.gguf import open_gguf as open_gguf
from jaxprune.models.hub import Source as Source
from jaxprune.models.hub import resolve as resolve
from jaxprune.models.pretrained import Pretrained as Pretrained
from jaxprune.models.pretrained import init_classifier as init_classifier
from jaxprune.models.pretrained import load_classifier as load_classifier
from jaxprune.models.save import save_classifier as save_classifier
from jaxprune.models.tokenizer import Tokenizer as Tokenizer
from jaxprune.models.tokenizer import load_tokenizer as load_tokenizer
