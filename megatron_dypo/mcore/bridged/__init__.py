"""Models whose names and sizes come from Megatron-Bridge (``model.family: bridge``)."""
