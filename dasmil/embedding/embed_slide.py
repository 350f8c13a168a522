"""One slide and its tiles → its bag."""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dasmil.bags import Bag, BagHeader, ExtractorCard, all_finite
from dasmil.embedding.dataset import TileChunk, chunk_ranges, read_chunk
from dasmil.embedding.extractor import Extractor
from dasmil.errors import InputError
from dasmil.geometry import Tiles
from dasmil.slides.cutting import TileCutter
from dasmil.slides.reader import Slide

READER = "2"  # changes whenever the same tile is read with other pixels
READ_AHEAD = 2  # chunks


def embed_slide(
    slide: Slide,
    tiles: Tiles,
    extractors: Mapping[str, Extractor],
    batch_size: int = 64,
    max_damaged_tiles: float = 0.0,
) -> Bag:
    """Read the tiles of a slide and embed them with the frozen extractor of their scale.

    It writes no file. Each part of the slide is read once for all scales, by a thread that reads
    ahead. The features are bit for bit those of :func:`dasmil.embedding.embed.embed` with this
    batch size on this device, if ``extractors`` have the precision of their cards.

    Parameters
    ----------
    slide: open; no other thread may read it meanwhile.
    tiles: its tiles.
    extractors: one per scale, all on one device. On a GPU their weights become channels last.
    batch_size: tiles per pass through a network.
    max_damaged_tiles: share of the finest tiles, in 0..1, that may be left out because their
        pixels, or those of a coarser tile around them, cannot be decoded.

    Raises
    ------
    InputError
        if the scales of ``tiles`` and ``extractors`` differ, more tiles are damaged, the slide
        cannot be read, or features are not finite.
    """
    refuse_other_scales(extractors, tiles)
    with torch.no_grad():
        embedding = SlideEmbedding(tiles, extractors, batch_size, max_damaged_tiles)
        for extractor in extractors.values():
            extractor.to(memory_format=embedding.layout)
        is_cuda = embedding.device.type == "cuda"
        for chunk in _read_ahead(TileCutter(slide, tiles), batch_size, is_cuda):
            embedding.add(chunk.to(embedding.device, non_blocking=is_cuda))
        return embedding.bag()


def _read_ahead(cutter: TileCutter, max_roots: int, pins: bool) -> Iterator[TileChunk]:
    """The chunks of a slide; pinned chunks are copied to a GPU without waiting for the network."""

    def read(start: int, stop: int) -> TileChunk:
        chunk = read_chunk(cutter, start, stop)
        return chunk.pin_memory() if pins else chunk

    chunks: deque[Future[TileChunk]] = deque()
    with ThreadPoolExecutor(1, "embed_slide") as reader:
        for start, stop in chunk_ranges(cutter.tiles, max_roots):
            chunks.append(reader.submit(read, start, stop))
            if len(chunks) > READ_AHEAD:
                yield chunks.popleft().result()
        while chunks:
            yield chunks.popleft().result()


def refuse_other_scales(extractors: Mapping[str, object], tiles: Tiles) -> None:
    """Raise :class:`InputError` unless there is one extractor per scale of the tiles."""
    if set(extractors) != set(tiles.scale_names):
        raise InputError(
            f"extractors: given for {', '.join(sorted(extractors)) or 'no scale'}, the tiles have "
            f"{', '.join(tiles.scale_names)}; give one extractor for each of them"
        )


def bag_header(tiles: Tiles, cards: Mapping[str, ExtractorCard]) -> BagHeader:
    """The header of the bag that these extractors make of these tiles."""
    return Bag(tiles, {}, cards, READER).header


def layout_on(device: torch.device) -> torch.memory_format:
    """Channels last, as tiles are read, is faster on a GPU only."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


class SlideEmbedding:
    """The features of one slide, while its chunks arrive in any order.

    Parameters
    ----------
    tiles: all tiles of the slide.
    extractors: one per scale, all on the device of the features.
    batch_size: tiles per pass through a network.
    max_damaged_tiles: share of the finest tiles that may be left out, in 0..1.
    """

    def __init__(
        self,
        tiles: Tiles,
        extractors: Mapping[str, Extractor],
        batch_size: int,
        max_damaged_tiles: float,
    ):
        self.tiles = tiles
        self.extractors = extractors
        self.max_damaged_tiles = max_damaged_tiles
        self.device = next(iter(extractors.values())).mean.device
        self.layout = layout_on(self.device)
        self.num_embedded = 0
        self.damage = ""  # the place of the first damaged tile, and what is wrong with it
        counts = tiles.num_tiles()
        self._damaged = {name: np.zeros(count, bool) for name, count in counts.items()}
        self._batches = {n: TileBatches(counts[n], batch_size, self.layout) for n in counts}
        # on the device, since copying each batch to the CPU would wait for it
        on_device: dict[str, Any] = {"device": self.device, "dtype": torch.float32}
        self._features = {
            name: torch.empty(count, extractors[name].card.feature_dim, **on_device)
            for name, count in counts.items()
        }

    @property
    def is_complete(self) -> bool:
        return self.num_embedded == sum(self.tiles.num_tiles().values())

    def add(self, chunk: TileChunk) -> None:
        """Embed the batches that a chunk completes.

        Raises
        ------
        InputError
            if too many tiles are damaged.
        """
        if chunk.damaged:
            self._add_damage(chunk)
        for name, pixels in chunk.tiles.items():
            for start, batch in self._batches[name].add(chunk.start[name], pixels):
                features = self.extractors[name](batch.contiguous(memory_format=self.layout))
                self._features[name][start : start + len(features)] = features
                self.num_embedded += len(features)

    def _add_damage(self, chunk: TileChunk) -> None:
        for name, damaged in chunk.damaged.items():
            start = chunk.start[name]
            self._damaged[name][start : start + len(damaged)] = damaged.numpy()
        self.damage = self.damage or chunk.reason
        finest = self.tiles.scales[-1].name
        kept = self.tiles.kept_rows(self._damaged)[finest]
        num_lost, share = int((~kept).sum()), self.max_damaged_tiles
        if num_lost > share * len(kept):
            raise InputError(
                f"{self.damage}; with it {num_lost} of {len(kept)} {finest} tiles are lost, and "
                f"--max_damaged_tiles {share:g} allows {int(share * len(kept))}"
            )

    def bag(self) -> Bag:
        """The bag of the complete slide, on the CPU.

        Raises
        ------
        InputError
            if features are not finite.
        """
        with torch.autocast(self.device.type, enabled=False):  # it takes no float16 on the CPU
            features = {name: _as_stored(rows) for name, rows in self._features.items()}
            wrong = [name for name, rows in features.items() if not all_finite(rows)]
        if wrong:
            raise InputError(
                f"{self.tiles.slide_id}: some {', '.join(wrong)} features are not finite; embed "
                "with --trainer.precision 32-true, or another extractor"
            )
        tiles, num_damaged = self.tiles, 0
        if self.damage:
            kept = tiles.kept_rows(self._damaged)
            features = {name: rows[torch.from_numpy(kept[name])] for name, rows in features.items()}
            num_damaged = int((~kept[tiles.scales[-1].name]).sum())
            tiles = tiles.select_rows(kept)
        cards = {name: extractor.card for name, extractor in self.extractors.items()}
        return Bag(tiles, features, cards, READER, num_damaged)


class TileBatches:
    """Tiles of one scale of one slide, grouped into batches of consecutive rows.

    The features of a tile depend, in their last digits, on the other tiles of its batch. So a batch
    never mixes slides, and holds the same tiles in whatever order they arrive: the bytes of a bag
    depend neither on other slides nor on reading processes or interruptions.

    Parameters
    ----------
    num_tiles: of the slide.
    size: tiles per batch; the last batch holds the rest.
    layout: of a batch in memory.
    """

    def __init__(self, num_tiles: int, size: int, layout: torch.memory_format):
        self.num_tiles = num_tiles
        self.size = size
        self.layout = layout
        self._incomplete: dict[int, tuple[Tensor, int]] = {}  # first row → tiles, how many are set

    def add(self, start: int, tiles: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Add the rows from ``start``; yield the first row and the tiles per complete batch.

        Parameters
        ----------
        tiles: (n, 3, H, W).
        """
        while len(tiles):
            first = start // self.size * self.size
            length = min(self.size, self.num_tiles - first)
            piece = tiles[: first + length - start]
            if len(piece) == length:
                yield first, piece
            else:
                batch, num_set = self._incomplete.pop(first, (None, 0))
                if batch is None:
                    batch = torch.empty(
                        (length, *tiles.shape[1:]),
                        dtype=tiles.dtype,
                        device=tiles.device,
                        memory_format=self.layout,
                    )
                batch[start - first : start - first + len(piece)] = piece
                if num_set + len(piece) == length:
                    yield first, batch
                else:
                    self._incomplete[first] = batch, num_set + len(piece)
            start, tiles = start + len(piece), tiles[len(piece) :]


def _as_stored(features: Tensor) -> Tensor:
    """float16, or float32 if some values are too large for it; on the CPU."""
    half = features.half()
    return (half if all_finite(half) else features).cpu()
