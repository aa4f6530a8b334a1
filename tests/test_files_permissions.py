"""What dsclip writes has the permissions that the umask gives: on a cluster, a group reads what one of it wrote."""

import os
from dataclasses import replace

import pytest
import torch

from dsclip.config.schema import LossSection
from dsclip.convert import export_hf
from dsclip.convert.dsclip_export import export_dsclip
from dsclip.convert.openclip_export import export_openclip
from dsclip.convert.source import open_source
from dsclip.convert.whole import whole_model
from dsclip.datasets.demo import demo_once
from dsclip.engine.feature_queue import FeatureQueue
from dsclip.engine.momentum import MomentumEncoder
from dsclip.model import Clip, resolve_preset
from dsclip.saving import WriteNow
from dsclip.weights.difference import write_difference
from tests.test_convert import checkpoint_of, perturbed
from tests.test_weights import TINY

CPU = torch.device("cpu")


def difference(model, out):
    out.mkdir()
    tuned = replace(model, state_dict={name: x + 1 for name, x in model.state_dict.items()})
    write_difference(out / "file", model, tuned, 0.1)


def queue(model, out):
    out.mkdir()
    FeatureQueue(LossSection(queue_size=3), (2,), (2,), CPU).save(WriteNow(), out)


def momentum(model, out):
    out.mkdir()
    ds_config = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}}
    MomentumEncoder(Clip(model.config), model.config, ds_config, 0.9, CPU).save(WriteNow(), out, 0)


WRITERS = {
    "hf": export_hf,
    "shards": lambda model, out: export_hf(model, out, max_shard_gb=1e-4),
    "openclip": export_openclip,
    "dsclip": export_dsclip,
    "difference": difference,
    "demo": lambda model, out: demo_once(out, 20, 20),
    "queue": queue,
    "momentum": momentum,
}


@pytest.mark.parametrize("umask", [0o022, 0o027])
@pytest.mark.parametrize("name", WRITERS)
def test_permissions_follow_the_umask(name, umask, demo, tmp_path):
    given = perturbed(resolve_preset("demo", vocab_size=612, eot_token_id=611, **TINY))
    before = os.umask(umask)
    try:
        export_hf(checkpoint_of(given, demo), tmp_path / "source")
        (tmp_path / "private").mkdir(mode=0o700)  # as those of tempfile, where a conversion's tokenizer lies
        model = whole_model(open_source(tmp_path / "source"), tmp_path / "private")
        WRITERS[name](model, tmp_path / "out")
    finally:
        os.umask(before)
    written = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert len(written) > 1
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in written}
    assert modes == {str(p.relative_to(tmp_path)): (0o777 if p.is_dir() else 0o666) & ~umask for p in written}
