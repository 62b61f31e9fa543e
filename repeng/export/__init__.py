"""Export adapters to formats of other software: plain LoRA files, GGUF, merged models, steering vectors."""

from typing import TYPE_CHECKING

from repeng._imports import lazily

if TYPE_CHECKING:
    from repeng.export.gguf import export_gguf, export_gguf_dial
    from repeng.export.lora import export_dial, export_lora
    from repeng.export.merged import export_merged
    from repeng.export.vectors import vector_of
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "export_dial": "repeng.export.lora",
            "export_gguf": "repeng.export.gguf",
            "export_gguf_dial": "repeng.export.gguf",
            "export_lora": "repeng.export.lora",
            "export_merged": "repeng.export.merged",
            "vector_of": "repeng.export.vectors",
        },
    )

__all__ = ["export_dial", "export_gguf", "export_gguf_dial", "export_lora", "export_merged", "vector_of"]
