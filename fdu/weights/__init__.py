"""What results are written to and read from: LoRA in two kinds of names, full pipelines and deltas."""

from fdu.weights.delta import DELTA_FILE
from fdu.weights.fingerprint import fingerprint
from fdu.weights.kohya import KOHYA_FILE
from fdu.weights.lora import LORA_FILE
from fdu.weights.merging import merge
from fdu.weights.readers import Loaded, load_weights
from fdu.weights.writers import Format, choose_format, public_name, write

__all__ = [
    "DELTA_FILE",
    "KOHYA_FILE",
    "LORA_FILE",
    "Format",
    "Loaded",
    "choose_format",
    "fingerprint",
    "load_weights",
    "merge",
    "public_name",
    "write",
]
