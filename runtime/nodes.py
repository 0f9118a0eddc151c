"""A bundle on the nodes of a cluster: found in a shared folder or fetched, and with plans for the node's GPU."""

from dataclasses import dataclass
from pathlib import Path

from ..bundles.bundle import Bundle
from ..bundles.fetching import fetch_bundle, is_address
from ..errors import BackendError
from ..messages import printable
from .settings.options import RuntimeOptions


@dataclass(frozen=True)
class BundleOnNodes:
    """How a bundle reaches the nodes of a cluster.

    Attributes:
        source: its folder, as it is called on every node, or an address that each node fetches it from once.
        digest: that the bundle must have.
        images: of one list of launches, at most; None: whatever plans are there must do. With a number, plans for the
            node's GPU are built where there are none.
    """

    source: str
    digest: str
    images: int | None = None

    @classmethod
    def of(cls, bundle: Bundle, given: str | None, images: int | None = None) -> "BundleOnNodes":
        """A bundle of this process.

        Args:
            bundle: that was opened here.
            given: what the user called it; an address is kept, else every node must have the folder.
            images: as above.
        """
        address = given if given is not None and is_address(given) else None
        return cls(address or str(bundle.folder.absolute()), bundle.digest, images)

    def open(self, options: RuntimeOptions) -> Bundle:
        """Opens the bundle on this node.

        Args:
            options: where its graphs will run.

        Raises:
            BackendError: the bundle is another one than the job's, or a plan cannot be built.
            UserError: the bundle cannot be fetched or read.
        """
        folder = fetch_bundle(self.source, self.digest) if is_address(self.source) else Path(self.source)
        bundle = Bundle.open(folder)
        if bundle.digest != self.digest:
            raise BackendError(f"{printable(folder)} is another bundle on a worker: copy the job's to every node")
        if options.backend == "tensorrt" and self.images is not None:
            build_missing(bundle, options, self.images)
        return bundle


def build_missing(bundle: Bundle, options: RuntimeOptions, images: int) -> None:
    """Builds the plans for this machine's GPU that the store does not have; other processes wait for them.

    Args:
        bundle: an fp16 bundle.
        options: whose `plans` are the store.
        images: the plans are for lists of launches of 1 to so many.

    Raises:
        UserError, BackendError: as `build_engines`.
    """
    from ..engines.build import BuildRequest, build_all
    from ..engines.flavor import load_flavor
    from ..engines.store import PlanStore

    request = BuildRequest(images=tuple(range(1, images + 1)))
    build_all([bundle], request, load_flavor("auto"), PlanStore(Path(options.plans) if options.plans else None))
