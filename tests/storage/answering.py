"""Several hosts in one process, which answer what a test says."""

import dataclasses

from mae_jax.hosts import Hosts


@dataclasses.dataclass(frozen=True)
class Answering(Hosts):
    """Hosts whose answers are known: `answers` by topic, else what this one says itself."""

    answers: dict | None = None

    def gather(self, topic, text):
        return (self.answers or {}).get(topic, [text] * self.count)
