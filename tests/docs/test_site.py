"""The site builds, and a link that leads nowhere ends the build."""

import shutil
import subprocess
import sys

from documented_lines import ROOT


def build(source, out) -> subprocess.CompletedProcess:
    words = ["--quiet", "--fail-on-warning", "--keep-going", "-c", str(source / "docs"), "-b", "html"]
    return subprocess.run(
        [sys.executable, "-m", "sphinx", *words, str(source), str(out)], capture_output=True, text=True, cwd=source
    )


def test_the_site_builds_and_has_every_command(tmp_path):
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "docs/commands.html").read_text()
    assert 'id="cache-hidden"' in page or "pipeline cache-hidden" in page
    assert (tmp_path / "pipeline/cache/README.html").is_file()


def test_a_link_that_leads_nowhere_ends_the_build(tmp_path):
    small = tmp_path / "repository"
    shutil.copytree(ROOT / "docs", small / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", small)
    (small / "docs/index.md").write_text("# A page\n\n[nowhere](no-such-page.md)\n")
    done = build(small, tmp_path / "out")
    assert done.returncode != 0 and "no-such-page.md" in done.stderr
