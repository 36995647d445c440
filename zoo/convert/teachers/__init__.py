"""Teachers: pretrained Transformers imported exactly, and written back. One adapter a family; see `adapter.py`."""

from zoo.convert.teachers import (  # noqa: F401 (each registers its family)
    albert,
    bert,
    gpt2,
    gpt_neox,
    llama,
    mobile_bert,
    opt,
    swin,
    timm_models,
    vit,
)
from zoo.convert.teachers.adapter import Packed, TeacherAdapter, list_teachers, register_teacher, rotary_of
from zoo.convert.teachers.importing import Teacher, load_teacher, save_original, write_back

__all__ = [
    "Packed",
    "Teacher",
    "TeacherAdapter",
    "list_teachers",
    "load_teacher",
    "register_teacher",
    "rotary_of",
    "save_original",
    "write_back",
]
