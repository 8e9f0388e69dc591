"""Mapping of a file's tensor names to ours: prefixes of wrappers, heads, and freshly initialised decoders.

Files are seldom exactly what `main_pretrain.py` wrote. The released ones are encoders without their decoders; those of
a wrapped or compiled model have a prefix before each name; those of a classifier have a head.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.errors import WeightsFileError
from jobs.weights.weight_checks import check_against
from model import ConvMAE, ConvMAEConfig
from model.weights import to_official
from pipeline.errors import clipped
from pipeline.printable import printable

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
"""Prefixes from DistributedDataParallel, torch.compile and enclosing models."""
_HEAD = "head."
"""Of a classifier, for which pretraining has no use."""
_FC_NORM = "fc_norm."
"""Of a classifier whose encoder was trained with it, in place of pretraining's last norm."""
_DECODER = "decoder."
_FUSION = ("encoder.stage1_output_decode.", "encoder.stage2_output_decode.")
"""Layers of the encoder that only pretraining has; they make the decoder's input."""
_NORM = "encoder.norm."
_FRESH = "--fresh-decoder"


@dataclass(frozen=True)
class WeightNames:
    """Which tensors of a file are used, and for what."""

    places: Mapping[str, str]
    """The file's names by ours."""
    fresh: tuple[str, ...]
    """Ours that are not read from the file."""
    notes: tuple[str, ...]
    """What the user should know about it, one line each."""


def weight_names(
    given: Mapping[str, Any],
    config: ConvMAEConfig,
    url: str,
    *,
    fresh_decoder: bool = False,
    encoder_alone: bool = False,
) -> WeightNames:
    """Find every tensor of a model in a file.

    Args:
        given: Tensors of the file by its own names; anything with a shape.
        config: Of the model.
        url: Of the file, for the message.
        fresh_decoder: Skip the file's decoder, if it has one, for a freshly initialised one.
        encoder_alone: What follows the encoder is not wanted: pretraining's last norm may be missing, as in an exported
            backbone, and the file may be a fine-tuned classifier.

    Raises:
        WeightsFileError: A name is missing, unexpected or duplicated, a shape differs, or the file is an encoder
            without decoder and `fresh_decoder` is not set.
    """
    ours = list(model_names(config))
    places, heads, notes = _placed(given, ours, url)
    lacking = _lacking(ours, places, fresh_decoder=fresh_decoder)
    if encoder_alone:
        lacking += [name for name in ours if name.startswith(_NORM) and name not in places]
        heads += [theirs for theirs in places.values() if _short(theirs).startswith(_FC_NORM)]
        places = {name: theirs for name, theirs in places.items() if theirs not in heads}
    if fresh_decoder and (replaced := [name for name in lacking if name in places]):
        notes.append(f"skipped: {len(replaced)} tensors of the file's decoder, for a fresh one")
        places = {name: theirs for name, theirs in places.items() if name not in lacking}
    if heads:
        notes.append(
            f"skipped: {len(heads)} tensors of a head ({', '.join(printable(clipped(name)) for name in heads[:3])})"
        )
    _check(given, places, config, url, lacking)
    if lacking and not fresh_decoder:
        rule = f"must have a decoder (it is an encoder alone, {len(lacking)} tensors of pretraining are missing)"
        raise WeightsFileError("weights", rule, url, f"start from it with a freshly initialised decoder: {_FRESH}")
    return WeightNames(places, tuple(lacking), tuple(notes))


def model_names(config: ConvMAEConfig) -> tuple[str, ...]:
    """Our names of all tensors of a model."""
    with torch.device("meta"):
        return tuple(ConvMAE(config).state_dict())


def fresh_tensors(names: tuple[str, ...], config: ConvMAEConfig, seed: int) -> dict[str, Tensor]:
    """The named tensors of a model as a run of that seed would initialise them."""
    if not names:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = ConvMAE(config).state_dict()
    return {name: state[name] for name in names}


def described(names: tuple[str, ...]) -> str:
    """A short text for freshly initialised tensors."""
    fusion = sum(name.startswith(_FUSION) for name in names)
    whole = f"the decoder, {len(names) - fusion} tensors"
    return f"{whole}; and the fusion of stages, {fusion}" if fusion else whole


def _placed(given: Mapping[str, Any], ours: list[str], url: str) -> tuple[dict[str, str], list[str], list[str]]:
    """The file's names by ours, or by themselves if they are none of ours; those of heads; notes."""
    known = {official: name for name, official in zip(ours, to_official(dict.fromkeys(ours)), strict=True)}  # type: ignore[arg-type]
    known |= {name: name for name in ours}
    places: dict[str, str] = {}
    heads: list[str] = []
    stripped: dict[str, int] = {}
    for theirs in given:
        bare = bare_name(theirs, known)
        prefix = theirs.removesuffix(bare)
        if bare not in known and bare.startswith(_HEAD):
            heads.append(theirs)
            continue
        name = known.get(bare, theirs)
        if name in places:
            rule = f"must hold each tensor once ({clipped(places[name])} and {clipped(theirs)} are one)"
            raise WeightsFileError("weights", rule, url, "give the state dict of one model")
        places[name] = theirs
        if prefix and bare in known:
            stripped[prefix] = stripped.get(prefix, 0) + 1
    return places, heads, [f"without their prefix {prefix}: {count} names" for prefix, count in stripped.items()]


def bare_name(theirs: str, known: Container[str]) -> str:
    """A name of a file without the prefixes before one of ours.

    Args:
        theirs: The file's.
        known: Names that are looked for; none: all prefixes are taken away.
    """
    bare = theirs
    while bare not in known and (prefix := next((some for some in PREFIXES if bare.startswith(some)), "")):
        bare = bare.removeprefix(prefix)
    return bare


def _lacking(ours: list[str], places: Mapping[str, str], *, fresh_decoder: bool) -> list[str]:
    """The decoder if the file has none or it is not wanted; then also the fusion, if the file has none."""
    decoder = [name for name in ours if name.startswith(_DECODER)]
    if not fresh_decoder and any(name in places for name in decoder):
        return []
    fusion = [name for name in ours if name.startswith(_FUSION)]
    return [*decoder, *([] if any(name in places for name in fusion) else fusion)]


def _check(
    given: Mapping[str, Any], places: Mapping[str, str], config: ConvMAEConfig, url: str, lacking: list[str]
) -> None:
    try:
        check_against({name: given[theirs] for name, theirs in places.items()}, config, url, absent=lacking)
    except WeightsFileError as error:
        if not any(theirs.startswith((_HEAD, _FC_NORM)) for theirs in map(_short, given)):
            raise
        remedy = "this is a fine-tuned classifier: give the file of its pretraining"
        raise WeightsFileError(error.field, error.rule, error.value, remedy) from None


def _short(theirs: str) -> str:
    return bare_name(theirs, ())
