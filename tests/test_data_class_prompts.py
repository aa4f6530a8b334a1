"""Captions of class folders: sentences with class names, drawn anew in each epoch, and which samples count as duplicates."""

from argparse import Namespace

import pytest
from PIL import Image

from dsclip.config import load_recipe
from dsclip.config.schema import DataSection
from dsclip.data import build_loader
from dsclip.data.sources.storage import LOCAL
from dsclip.datasets.make import make_shards
from dsclip.errors import UserError
from dsclip.train.class_prompts import with_class_prompts
from dsclip.train.inputs import read_inputs

TEMPLATES = ["a photo of a {}.", "a sketch of a {}.", "{} in the dark."]
CLASSES = ["cat", "frog"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Twelve images of two classes, as make_shards writes them."""
    folder = tmp_path_factory.mktemp("classes")
    for i in range(12):
        path = folder / "images" / CLASSES[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(path)
    make_shards(folder / "images", folder / "shards", holdout=0, tokenizer="demo")
    return str(folder / "shards")


def loader(data, tokenizer, **further):
    options = further | dict(image_size=32, context_length=24, global_batch_size=12, seed=3)
    return iter(build_loader(data, tokenizer=tokenizer, **options))


def test_a_batch_has_the_classes_that_a_classifier_asks_for(shards, tokenizer):
    """As many as it has: the second class is beyond a classifier of one, and a batch without classifiers has none."""
    section = with_class_prompts(
        DataSection(train_shards=shards, workers=2, templates=["{}"], max_bad_fraction=1), LOCAL
    )
    names = section.classnames
    for classes in (2, 1):
        batch = next(loader(section, tokenizer, classes=classes))
        assert [names[label] for label in batch.classes.tolist()] == batch.report.captions
        assert batch.rows(3, 5).classes.tolist() == batch.classes[3:5].tolist()
        assert set(batch.report.bad) == ({"class beyond those of the classifier"} if classes == 1 else set())
    assert next(loader(section, tokenizer)).classes is None


def test_a_classifier_of_other_classes_than_the_data_has_is_refused(shards):
    keys = {"config": "core_tuning", "ds_config": "ds_configs/zero1_bf16.json", "resume": "none"}
    overrides = [
        f"data.train_shards={shards}",
        "model.init=null",
        "model.preset=demo",
        "data.tokenizer=demo",
        "eval.zeroshot_shards=null",
    ]
    with pytest.raises(UserError, match="a classifier has 10 classes, and the data 2; set its `width` to that"):
        read_inputs(Namespace(**keys, overrides=overrides))


def test_each_image_has_one_of_its_class_s_sentences_and_equal_classes_are_duplicates(shards, tokenizer):
    section = DataSection(train_shards=shards, workers=0, templates=TEMPLATES)
    batches = loader(with_class_prompts(section, LOCAL), tokenizer)
    seen: dict[int, set[str]] = {}
    for _ in range(8):
        batch = next(batches)
        assert len(set(batch.keys.tolist())) == 2
        by_class: dict[int, set[str]] = {}
        for sample, key, caption in zip(
            batch.sample_ids.tolist(), batch.keys.tolist(), batch.report.captions, strict=True
        ):
            assert caption in {t.replace("{}", name) for t in TEMPLATES for name in CLASSES}
            by_class.setdefault(key, set()).add("cat" if "cat" in caption else "frog")
            seen.setdefault(sample, set()).add(caption)
        assert sorted(map(sorted, by_class.values())) == [["cat"], ["frog"]]
    assert len(seen) == 12 and all(len({"cat" in caption for caption in captions}) == 1 for captions in seen.values())
    assert max(len(captions) for captions in seen.values()) == len(TEMPLATES), "another one is drawn in another epoch"


def test_names_may_be_others_than_the_folders(shards, tokenizer):
    section = DataSection(train_shards=shards, workers=0, templates=["the {}."], classnames=["tomcat", "toad"])
    batch = next(loader(with_class_prompts(section, LOCAL), tokenizer))
    assert set(batch.report.captions) == {"the tomcat.", "the toad."}


def test_a_class_without_a_name_and_a_sample_without_a_class_are_left_out_and_counted(shards, demo, tokenizer):
    short = DataSection(train_shards=shards, workers=0, templates=["{}"], classnames=["cat"], max_bad_fraction=1.0)
    report = next(loader(short, tokenizer)).report
    assert report.bad["class without a name"] > 0 and set(report.captions) == {"cat"}


def test_a_run_looks_names_and_sets_up_and_its_recipe_says_them(shards):
    keys = [f"data.train_shards={shards}", "data.templates=cifar", "batch.global_batch_size=4", "data.workers=0"]
    arguments = Namespace(
        config="cifar10", ds_config="zero1_bf16", resume="none", overrides=[*keys, "eval.zeroshot_shards=null"]
    )
    data = read_inputs(arguments).recipe.data
    assert data.classnames == CLASSES and len(data.templates) == 18 and data.templates[0] == "a photo of a {}."


def test_what_can_t_be_made_into_captions_is_refused(shards, demo, tokenizer):
    with pytest.raises(UserError, match=r"template 'a photo' has no \{\}"):
        with_class_prompts(DataSection(train_shards=shards, templates=["a photo"]), LOCAL)
    with pytest.raises(
        UserError, match="templates: imagenot is no file; give a file with one a line, or one of openai"
    ):
        with_class_prompts(DataSection(train_shards=shards, templates="imagenot"), LOCAL)
    with pytest.raises(UserError, match="manifests don't say one list of them. Give it as `data.classnames`"):
        with_class_prompts(
            DataSection(train_shards=[shards, str(demo / "train")], weights=[1.0, 1.0], templates="cifar"), LOCAL
        )
    with pytest.raises(UserError, match="has 3 names, and the training shards' manifests say 2 classes"):
        with_class_prompts(DataSection(train_shards=shards, templates="cifar", classnames=["a", "b", "c"]), LOCAL)
    for key in ("templates", "classnames"):
        with pytest.raises(UserError, match=f"`data.{key}` is empty"):
            load_recipe("demo", ["data.templates=cifar", f"data.{key}=[]"])
    with pytest.raises(UserError, match="must be lists here"):
        next(loader(DataSection(train_shards=shards, workers=0, templates="cifar"), tokenizer))
    with pytest.raises(UserError, match="`data.classnames` are put into sentences; set `data.templates` too"):
        load_recipe("demo", ["data.classnames=[cat]"])
