"""Whether the encoders of a workspace still embed on this machine as they did where they were made."""

from collections.abc import Iterator
from dataclasses import dataclass

from graceful.errors import GracefulError
from graceful.files import exists, join
from graceful.flows.store.workspace import Workspace
from graceful.training.generation import CARD_FILE, read_card
from graceful.training.probes import Agreement, Probes, changed_libraries, read_probes, said_of


@dataclass(frozen=True)
class Examined:
    """What is known of one generation's encoder here. `agreement` is None where nothing was embedded."""

    generation: str
    has_probes: bool
    changed: str = ""
    agreement: Agreement | None = None
    error: str = ""

    @property
    def said(self) -> str:
        """In one line."""
        if self.error:
            return self.error
        if not self.has_probes:
            return "no probes"
        if self.agreement is None:
            return "made with these libraries"
        state = "REFUSED" if self.agreement.is_refused else "differs a little" if self.agreement.is_noted else "agrees"
        return f"{state}: cosine {self.agreement.worst_cosine:.5f} ({self.agreement.said})"


def examine_encoders(workspace: Workspace, *, always: bool = False) -> Iterator[Examined]:
    """Look at the encoder of every generation that is kept.

    Its probes are embedded again where a library is not the one that made it, which loads torch; else only `always`.
    """
    for generation in workspace.kept():
        uri = workspace.generation_uri(generation)
        if not exists(join(uri, CARD_FILE)):
            continue
        try:
            probes = read_probes(uri)
            yield Examined(generation, False) if probes is None else _examined(generation, uri, probes, always)
        except GracefulError as error:
            yield Examined(generation, True, error=str(error))


def _examined(generation: str, uri: str, probes: Probes, always: bool) -> Examined:
    changed = changed_libraries(probes, read_card(uri).backbone.name)
    if not changed and not always:
        return Examined(generation, True)
    from graceful.training.encoder import probe_encoder

    return Examined(generation, True, said_of(changed), probe_encoder(uri))
