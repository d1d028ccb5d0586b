"""The demo world: rendered clips, questions about them, a tiny Qwen2.5-VL and its warm start."""

from keytoken.data.torchvision_ops import declare_missing_operators

# Must precede the first import of a transformers model, which imports torchvision.
declare_missing_operators()
