"""Whether a device computes what the CPU does, and the accuracy of the same weights in both."""

import math

import pytest
import torch
from torch import nn

from benchmarks import check, pretrained
from benchmarks.kinds import Check, Pretrained
from benchmarks.report import tables
from experiments.study.results import Results, read


def test_undefined_numbers_pass_nowhere():
    nan = math.nan
    assert not check.apart([1.0, nan, 1.0], [1.0, 1.0, 1.0]) <= check.BAND


def test_the_device_check_passes_on_the_cpu_and_fails_for_a_wrong_device(tmp_path, monkeypatch):
    results = Results(tmp_path)
    right = results.add(Check, **check.run(torch.device("cpu")))
    assert right.verdict == "within all bands", right
    assert set(right.kernels) == {"float32"}
    assert "band" in check.text(right)
    monkeypatch.setattr(check, "logits_error", lambda device, dtype: math.nan)
    wrong = results.add(Check, **check.run(torch.device("cpu")))
    assert wrong.verdict == "outside a band"
    assert "logits in float32, float64 on the CPU: nan, band 1e-05" in check.text(wrong)
    lines = tables.check_table([wrong]).body
    assert [line[-1] for line in lines] == ["no", "yes"]
    assert [result.kind for result in read(results.path)] == ["check", "check"]
    assert check.apart([1.0, 1.1], [1.0, 1.0]) == pytest.approx(0.1)


def test_accuracy_of_a_saved_timm_model_in_both(tmp_path):
    import timm
    from PIL import Image
    from timm.models import save_for_hf

    arguments = {"img_size": 32, "num_classes": 3, "embed_dim": 24, "depth": 2, "num_heads": 3}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    nn.init.normal_(model.head.weight)
    save_for_hf(model, tmp_path / "saved", model_args=arguments, safe_serialization=True)
    for number, name in enumerate("abc"):
        (tmp_path / "val" / name).mkdir(parents=True)
        for picture in range(4):
            pixels = torch.randint(0, 255, (40, 50, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "val" / name / f"{number}{picture}.png")
    place = tmp_path / "saved" / "model.safetensors"
    values = pretrained.measure(str(place), tmp_path / "val", batch=5, device=torch.device("cpu"))
    result = Results(tmp_path).add(Pretrained, **values)
    assert result.identical == result.images == 12
    assert result.reference == "timm:vit_tiny_patch16_224"
    assert result.weights == "model.safetensors"
    assert result.of_reference.top1 == result.of_candidate.top1
    assert result.of_candidate.top5 == 1
    assert result.logits_apart < 1e-4
    assert "predictions identical: 12 of 12" in pretrained.text(result)
    assert len(read(tmp_path / "results.jsonl")) == 1
    lines = tables.pretrained_table([result]).body
    assert [line[0] for line in lines] == [result.reference, result.candidate]
    assert [line[6] for line in lines] == ["12 of 12"] * 2
    whole = (tmp_path / "val" / "a" / "01.png").read_bytes()
    (tmp_path / "val" / "a" / "01.png").write_bytes(whole[:2000])
    (tmp_path / "val" / ".cache").mkdir()
    with pytest.raises(ValueError, match=r"01\.png can't be decoded"):
        pretrained.measure(str(place), tmp_path / "val", batch=5, device=torch.device("cpu"))
    (tmp_path / "val" / "d").mkdir()
    with pytest.raises(ValueError, match="d is a class without pictures"):
        pretrained.measure(str(place), tmp_path / "val", batch=5, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"no config\.json beside the weights"):
        pretrained.load(str(tmp_path / "val" / "a" / "00.png"))
    place.write_bytes(place.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"timm can't read .*model\.safetensors"):
        pretrained.load(str(place))
    for junk in (b"", b"junk"):
        (place.parent / "weights.pth").write_bytes(junk)
        with pytest.raises(ValueError, match=r"timm can't read .*weights\.pth"):
            pretrained.load(str(place.parent / "weights.pth"))
    (place.parent / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"timm can't read .*saved"):
        pretrained.load(str(place.parent))
