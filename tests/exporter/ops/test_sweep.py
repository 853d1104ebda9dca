"""Every operator, through every implementation, over every case, in every dtype; and no part missing without a reason."""

import pytest

from isthmus.exporter.errors import IsthmusError
from isthmus.exporter.op import OPS, PARTS


def test_the_implementation_agrees_with_the_reference(swept, sweep):
    name, implementation, case, dtype = swept
    module = sweep.implementations()[implementation]
    if reason := getattr(module, "not_run", str)():
        pytest.skip(f"not run: {reason}")
    inputs, attributes, reference = sweep.prepared(name, case, dtype)
    sweep.check(OPS[name], module.run(OPS[name], dict(inputs), attributes), reference, dtype, module.ARITHMETIC)


@pytest.mark.parametrize(("name", "part"), [(n, p) for n in OPS for p in PARTS])
def test_every_part_is_there_or_cannot_be(name, part):
    op = OPS[name]
    assert op.has(part) != (part in op.lacks), f"{op.folder / PARTS[part].file}"
    if part in op.lacks:
        with pytest.raises(IsthmusError, match=f"no part '{part}'"):
            op.part(part)


@pytest.mark.parametrize("part", [p for p in PARTS if p not in ("reference", "cases")])
def test_every_part_is_executed(part, sweep):
    assert any(part == module.PART for module in sweep.implementations().values())


@pytest.mark.parametrize("name", list(OPS))
def test_cases_have_names_of_their_own(name, sweep):
    names = [case.name for case in sweep.cases(OPS[name])]
    assert names
    assert len(set(names)) == len(names)
