"""Every tutorial does from start to end what it says."""

import functools
import shutil
from pathlib import Path

import pytest

from tests.support.slurm_client import Cluster
from tests.support.tutorial import is_on_a_cluster, missing_line, run_page, start_of, steps_of

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
PAGES = sorted(page.name for page in FOLDER.glob("*.md") if page.name != "index.md")
LONGEST_LINES = 168  # without the files that a reader writes


@pytest.fixture(scope="session")
def after(tmp_path_factory):
    """Runs a page once, in a copy of the folder where it starts, and returns where it ended."""

    @functools.cache
    def run(page: str, cluster: Cluster | None = None) -> Path:
        folder = tmp_path_factory.mktemp("tutorials") / page.removesuffix(".md")
        start = start_of((FOLDER / page).read_text(encoding="utf-8"))
        shutil.copytree(run(start), folder) if start else folder.mkdir()
        run_page(FOLDER / page, folder, variables=cluster.user_variables if cluster else None, timeout_s=900)
        return folder

    return run


ON_A_CLUSTER = [page for page in PAGES if is_on_a_cluster((FOLDER / page).read_text(encoding="utf-8"))]


@pytest.mark.long
@pytest.mark.parametrize("page", [page for page in PAGES if page not in ON_A_CLUSTER])
def test_a_tutorial_runs_from_start_to_end(page, after):
    after(page)


@pytest.mark.long
@pytest.mark.slurm
@pytest.mark.parametrize("page", ON_A_CLUSTER)
def test_a_tutorial_of_a_cluster_runs_from_start_to_end(page, after, cluster):
    after(page, cluster)


@pytest.mark.parametrize("page", PAGES)
def test_a_tutorial_is_short_has_a_goal_and_is_listed(page):
    text = (FOLDER / page).read_text(encoding="utf-8")
    files = sum(step.text.count("\n") for step in steps_of(text) if step.file)
    assert text.count("\n") - files <= LONGEST_LINES
    assert text.split("\n")[2].startswith("**Goal:** ")
    assert any(step.outputs for step in steps_of(text))
    assert f"({page})" in (FOLDER / "index.md").read_text(encoding="utf-8")


PAGE = """
```yaml title="in/here.yaml"
a: 1
```

<!-- exit code 3 -->
```bash
cat in/here.yaml; exit 3
```
```
a: 1
```

```bash
export WORD="step 7 of 70"
sleep 600 &
```

<!-- in the test:
echo "$WORD"
-->
```bash
a program that nobody has
```
```
what only that program prints
```

```bash
echo "$WORD"; echo between; echo 'in 12.5 s'
```
```
step 8 of 70
...
in 3 s
```

<!-- exact -->
```
step 7 of 70
```
"""


def test_a_page_is_run_as_a_reader_would(tmp_path):
    page, folder = tmp_path / "page.md", tmp_path / "reader"
    page.write_text(PAGE)
    folder.mkdir()
    steps = run_page(page, folder)
    assert [step.file for step in steps] == ["in/here.yaml", None, None, None, None]
    assert [path.name for path in folder.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("exit code 3", "exit code 4", "ended with 99 at"),
        ("cat in/here", "cat in/there", "shows a line that is not printed in its place:\na: 1"),
        ("```\na: 1", "```\na: b", "shows a line that is not printed in its place:\na: b"),
        ("step 8 of 70\n", "steps 8 of 70\n", "steps 8 of 70"),
        ("...\nin 3 s", "in 3 s\nbetween", "\nbetween"),
        ("```\nstep 7 of 70", "```\nstep 8 of 70", "step 8 of 70"),
        ("sleep 600 &", "false", "ended with 1 at:\nexport"),
        ("sleep 600 &", "sleep 600", "ended with -1 at:\nexport"),
        ("sleep 600 &", "exit 0", "ended with 0 at:\nexport"),
    ],
)
def test_a_page_that_says_something_else_fails(right, wrong, complaint, tmp_path):
    page, folder = tmp_path / "page.md", tmp_path / "reader"
    assert PAGE.count(right) == 1
    page.write_text(PAGE.replace(right, wrong))
    folder.mkdir()
    with pytest.raises(AssertionError, match=complaint):
        run_page(page, folder, timeout_s=3)


@pytest.mark.parametrize("comment", ["exit code two", "in a test: true"])
def test_a_comment_that_no_rule_reads_is_refused(comment):
    with pytest.raises(ValueError, match=comment):
        steps_of(f"<!-- {comment} -->\n```bash\ntrue\n```\n")


def test_other_numbers_pass_and_other_words_do_not():
    line = "saved runs/x/step_00000003 in fp32 after 0.3 s by 20261130T135645-27549, SHA-256 8a9154536e8a"
    other = "saved runs/x/step_00000123 in fp32 after 1,200 s by 20250101T000000-1, SHA-256 0e2f13860d11"
    assert missing_line(other, line, exact=False) is None
    assert missing_line("saved runs/x/step_00000123 in fp32 ...", line, exact=False) is None
    assert missing_line("job4.0: left, as job4.0.1 did", "job13.2: left, as job13.2.0 did", exact=False) is None
    for wrong in (other.replace("fp32", "fp16"), other.replace("saved", "kept"), "kept ...", "saved", other + " again"):
        assert missing_line(wrong, line, exact=False) == wrong
    assert missing_line(line, line, exact=True) is None
    assert missing_line(line.replace("0.3", "0.4"), line, exact=True) is not None
