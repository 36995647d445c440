"""Models: one backbone, heads by task, states inside transformers' caches.

Importing this package registers the models with transformers' Auto classes, so that
`AutoModelForCausalLM.from_pretrained(folder)` works. `import zoo` alone does not: it stays cheap.
"""

from zoo.models import heads
from zoo.models.shared import unshare

__all__ = ["heads", "unshare"]
