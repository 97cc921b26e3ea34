"""Tables that follow from code are what the code says, and every code of an error is explained."""

from __future__ import annotations

import re

import pytest
import yaml

from config.catalog import ROOT
from deployments.api.errors import ErrorCode
from docs import reference
from tests.docs.pages import DOCS

TABLES = sorted(page.name for page in DOCS.glob("*.md") if "<!-- table:" in page.read_text())


@pytest.mark.parametrize("page", TABLES)
def test_tables_are_what_the_code_says(page: str) -> None:
    text = (DOCS / page).read_text()
    assert reference.filled(text) == text, "run `python docs/reference.py`"


def test_every_table_is_on_a_page() -> None:
    shown = set().union(*(re.findall(r"<!-- table: ([\w-]+) -->", page.read_text()) for page in DOCS.glob("*.md")))
    assert shown == set(reference.TABLES)


def test_a_changed_table_is_written_anew() -> None:
    page = "before\n<!-- table: samplers -->\n| old |\n<!-- end of table -->\nafter\n"
    assert reference.filled(page) == page.replace("| old |", reference.samplers())


def test_every_error_code_is_explained() -> None:
    listed = set(re.findall(r"\| (\d{5}) \|", (DOCS / "http-api.md").read_text()))
    assert listed == {str(int(code)) for code in ErrorCode}


def test_every_alert_has_a_section_and_links_to_it() -> None:
    rules = yaml.safe_load((ROOT / "k8s/components/monitoring/alerts.yaml").read_text())
    alerts = [rule for group in rules["spec"]["groups"] for rule in group["rules"]]
    headings = set(re.findall(r"^### (\w+)$", (DOCS / "operations.md").read_text(), re.MULTILINE))
    assert {alert["alert"] for alert in alerts} == headings
    for alert in alerts:
        assert alert["annotations"]["runbook_url"].endswith(f"docs/operations.md#{alert['alert'].lower()}")


def test_cited_decisions_exist_and_no_two_share_an_id() -> None:
    ids = re.findall(r"^### ([A-Z0-9]{3}-\d+): ", (DOCS / "decisions.md").read_text(), re.MULTILINE)
    assert len(ids) == len(set(ids))
    rooms = "|".join({name.partition("-")[0] for name in ids})
    folders = ("config", "pipelines", "deployments", "models", "training", "benchmarks", "k8s", "tests")
    files = [
        path for folder in folders for kind in ("py", "yaml", "js", "md") for path in (ROOT / folder).rglob(f"*.{kind}")
    ]
    cited = {id_ for path in files for id_ in re.findall(rf"\b(?:{rooms})-\d+\b", path.read_text())}
    assert cited
    assert cited <= set(ids)
