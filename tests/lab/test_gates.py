"""The gates of a bundle, on networks whose answers are known."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from ec2face_lab.prepare.captions import caption_facts
from ec2face_lab.study import gates
from ec2face_lab.world.facts import fact_names, fact_targets, facts
from ec2face_lab.world.sources import FaceBatch, ProceduralFaces


@pytest.fixture(scope="module")
def shown() -> list[FaceBatch]:
    return [ProceduralFaces().faces(gates.SEED, 0, 24, (("first", "balanced", 1.0),))]


@dataclasses.dataclass
class FakeParser:
    """Knows the truth, except that a share of the rows of every picture is background."""

    faces: FaceBatch
    first: int
    last: int

    def parse(self, images: torch.Tensor) -> torch.Tensor:
        assert torch.equal(images, self.faces.image)
        parsed = self.faces.label_map.clone()
        parsed[:, self.first : self.last] = 0
        return parsed


class FakeNet:
    """Answers all facts right but for one face's."""

    def __init__(self, faces: FaceBatch) -> None:
        self.truth = fact_targets(faces.attributes, facts(faces.attributes))

    def holds(self, images: torch.Tensor) -> torch.Tensor:
        answers = self.truth.clone()
        answers[0] = ~answers[0]
        return answers


def test_errors_are_shared_where_both_parsers_are_wrong(shown):
    faces = shown[0]
    guide = FakeParser(faces, 20, 40)
    evaluator = FakeParser(faces, 30, 50)
    values = gates._perception(shown, {"guiding": guide, "scoring": evaluator}, FakeNet(faces))
    wrong = faces.label_map > 0
    expected = wrong[:, 30:40].sum() / wrong[:, 30:50].sum()
    assert values["parsers: shared errors (at most)"] == pytest.approx(100 * float(expected))
    truth = fact_targets(faces.attributes, facts(faces.attributes))
    alike = torch.where(truth[0], truth.sum(0), (~truth).sum(0))  # faces that answer as the first
    told = (truth.sum(0) > 0) & ((~truth).sum(0) > 0)
    lowest = 100 - 50 / int(alike[told].min())  # one of them is wrong
    assert values["attribute evaluator: lowest balanced accuracy"] == pytest.approx(lowest)
    assert values["guiding parser: OAA"] < 100


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_conditions_are_drawn_by_a_base_that_follows_them(monkeypatch, share):
    def velocity(transformer, z_t, t, text, mask_latents):
        assert len(text) == len(z_t)
        return (z_t - share * mask_latents) / t.view(-1, 1, 1, 1)  # the way there is straight

    def condition(kind, shown, generator):
        assert kind in ("albedo", "regions")
        return shown.label_map[:, None].float() / 18

    def embed(texts):
        return torch.zeros(len(texts), 1, 2), torch.zeros(len(texts), 2), None

    def parse(images):
        return (18 * images[:, 0]).round().long().clamp(min=0)

    monkeypatch.setattr(gates, "CONDITIONED", 40)
    monkeypatch.setattr(gates, "predict_velocity", velocity)
    monkeypatch.setattr(gates, "dense_condition", condition)
    monkeypatch.setattr(gates, "encode_images", lambda _, x: x)
    monkeypatch.setattr(gates, "decode_latents", lambda _, x: x)
    pipeline = SimpleNamespace(vae=None, transformer=None, encode_prompt=embed)
    parser = SimpleNamespace(parse=parse)
    values = gates._conditions(ProceduralFaces(), pipeline, parser)
    assert set(values) == {name for name in gates.WANTED if "condition" in name}
    for value in values.values():
        assert value == 100 if share else value < 80


def test_prompts_ask_for_every_gate_of_the_base():
    prompts = gates.base_prompts(ProceduralFaces(), 200)
    mentioned = [set(caption_facts(prompt)) for prompt in prompts]
    for fact in ("hat", "eyeglasses", "earrings", "necklace"):
        assert sum(fact in names for names in mentioned) >= 10
    rows = ProceduralFaces.sample(gates.SEED + 2, range(200), "first", "balanced").attributes
    known = set(fact_names(facts(rows)))
    assert all(names <= known | {"female"} for names in mentioned)


def test_a_bundle_without_a_base_does_not_pass(monkeypatch, tiny_config):
    values = dict.fromkeys(gates.WANTED, 99.9)
    values["parsers: shared errors (at most)"] = 40.0
    inner = {k: v for k, v in values.items() if not k.startswith(("autoencoder", "base"))}
    monkeypatch.setattr(gates, "Portraits", lambda _: ProceduralFaces())
    monkeypatch.setattr(gates.FaceParser, "from_config", lambda *_: None)
    monkeypatch.setattr(gates, "load_facts", lambda *_: None)
    monkeypatch.setattr(gates, "_perception", lambda *_: inner)
    monkeypatch.setattr(gates, "_retrieval", lambda *_: {})
    config = tiny_config.replace(backbone={"path": "data/nothing"})
    table = gates.measure_gates(config, faces=2).set_index("gate")
    assert list(table.index) == list(gates.WANTED)
    passed = set(table.index[table["holds"]])
    assert passed == set(inner)
    assert table["value"].isna().sum() == len(gates.WANTED) - len(inner)


def test_an_autoencoder_is_measured_before_there_is_a_base(monkeypatch, tiny_config, tmp_path):
    trained = torch.nn.Identity()
    name = "autoencoder: OAA, % of the real images'"
    monkeypatch.setattr(gates, "Portraits", lambda _: ProceduralFaces())
    monkeypatch.setattr(gates.FaceParser, "from_config", lambda *_: None)
    monkeypatch.setattr(gates, "load_facts", lambda *_: None)
    monkeypatch.setattr(gates, "_perception", lambda *_: {})
    monkeypatch.setattr(gates, "_retrieval", lambda *_: {})
    monkeypatch.setattr(gates, "work_folder", lambda _: tmp_path)
    monkeypatch.setattr(gates, "with_trained_vae", lambda *_: SimpleNamespace(vae=trained))
    monkeypatch.setattr(gates, "_round_trip", lambda _, __, vae: {name: 98.5 * (vae is trained)})
    config = tiny_config.replace(backbone={"path": "data/nothing"})
    assert gates.measure_gates(config, faces=2)["value"].isna().all()
    (tmp_path / "vae.json").write_text("{}")
    table = gates.measure_gates(config, faces=2).set_index("gate")
    assert table.loc[name].tolist() == [98.5, 98.0, True]
    assert table["value"].notna().sum() == 1
    (tmp_path / "base").mkdir()  # not distilled: it has to be guided
    seen = []

    class Pipeline:
        vae = trained

        @classmethod
        def from_config(cls, config, variant):
            seen.append((config.backbone.path, config.sampling, variant))
            return cls()

        def to(self, device):
            return self

        def set_progress_bar_config(self, **_):
            pass

    monkeypatch.setattr(gates, "EC2FacePipeline", Pipeline)
    monkeypatch.setattr(gates, "_base", lambda *_: {"base: both eyes": 99.0})
    monkeypatch.setattr(gates, "_conditions", lambda *_: {})
    config = config.replace(sampling={"guidance": 3.0, "text_guidance": 1.0})
    table = gates.measure_gates(config, faces=2).set_index("gate")
    assert table["value"].notna().sum() == 2 and table.loc["base: both eyes", "holds"]
    path, sampling, variant = seen[0]
    assert path == str(tmp_path / "base") and variant is None
    assert (sampling.guidance, sampling.text_guidance) == (1.0, 3.0)
