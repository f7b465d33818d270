"""python -m lib.book.one_page chapter/slug: execute and render one page alone (`make page`). The result is under _build/page/."""
import re
import subprocess
import sys

from .paths import BUILD, ROOT, page_path


def main(argv=None):
    keys = argv or sys.argv[1:]
    if len(keys) != 1 or not page_path(keys[0]).exists():
        sys.exit(f"expected the key of a page, such as optimizers/adabelief; got {keys}")
    out = BUILD / "page"
    out.mkdir(parents=True, exist_ok=True)
    toc = out / "_toc.yml"
    # the bibliography comes along: citations resolve to it
    toc.write_text(f"format: jb-book\nroot: chapters/{keys[0]}\nchapters:\n  - file: chapters/bibliography\n")
    # no -W: references to pages that this build leaves out cannot be resolved, and say so
    done = subprocess.run([sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(ROOT), "--toc", str(toc), "--path-output", str(out), "-q"],
                          cwd=ROOT, stderr=subprocess.PIPE, text=True)
    lines = [line for line in done.stderr.splitlines() if not re.search(r"myst\.xref_missing|not in any toctree|toc\.not_readable", line)]
    print("\n".join(lines), file=sys.stderr)
    page = out / "_build" / "html" / "chapters" / f"{keys[0]}.html"
    if done.returncode or not page.exists():
        sys.exit(done.returncode or 1)
    print(f"The page is in {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
