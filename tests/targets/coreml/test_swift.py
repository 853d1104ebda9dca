"""The Swift package of a bundle: it parses, its texts are no code, and its sampler computes what the Python one does."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tree_sitter
import tree_sitter_swift

from isthmus.embedding import embed
from isthmus.exporter.bundle import INPUTS, OUTPUTS, read_cases, read_manifest, write_cases, write_manifest
from isthmus.exporter.errors import IntegrityError, UnsupportedError
from isthmus.exporter.manifest import MANIFEST
from isthmus.exporter.sampling import LoopCall, LoopSampler
from isthmus.exporter.spec import MODELS
from isthmus.models.flow import RectifiedFlowSampler
from isthmus.targets.coreml.convert import identifiers as package_names
from isthmus.targets.coreml.golden import answer, converted, integrate, scalar_type, write_golden
from isthmus.targets.coreml.session import Interface
from isthmus.targets.coreml.swift import NOT_COMPILED, RUNTIME
from isthmus.targets.coreml.swift_names import identifiers, literal, module_name, shown, tool_name


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


bundles = _load("swift_bundles")
PARSER = tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language()))


def faults(text):
    """Where the text is not Swift, as far as a grammar without types can tell."""
    found, open_nodes = [], [PARSER.parse(text.encode()).root_node]
    while open_nodes:
        node = open_nodes.pop()
        if node.is_error or node.is_missing:
            found.append((node.type, node.start_point.row + 1, text.encode()[node.start_byte : node.start_byte + 80]))
        open_nodes += node.children
    return found


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Every bundle of `swift_bundles`, and the package that is written of it."""
    folder = tmp_path_factory.mktemp("swift")
    made = {}
    for name, write in bundles.BUNDLES.items():
        made[name] = (write(folder / "bundles" / name), embed(folder / "bundles" / name, "swift", folder / "packages" / name))
    return made


@pytest.fixture(params=list(bundles.BUNDLES))
def package(request, packages):
    return packages[request.param]


def sources(result):
    return {path.relative_to(result.path).as_posix(): path.read_text() for path in sorted(result.path.rglob("*.swift"))}


def interface(result):
    return (result.path / "Sources" / result.name / "Interface.swift").read_text()


def description(result):
    return json.loads((result.path / "Sources" / result.name / "Resources" / "model.json").read_text())


# It is Swift.


def test_every_file_parses(package):
    _, result = package
    assert {name: found for name, text in sources(result).items() if (found := faults(text))} == {}


@pytest.mark.parametrize("damage", [lambda t: t.rstrip()[:-1], lambda t: t + ")", lambda t: t + "}"])
def test_an_unbalanced_file_does_not_parse(packages, damage):
    for name, text in sources(packages["sampler"][1]).items():
        assert faults(damage(text)), name


def test_nothing_of_the_templates_is_left(package):
    _, result = package
    for path in result.path.rglob("*"):
        if path.is_file() and path.suffix in (".swift", ".md"):
            text = path.read_text().replace(bundles.HOSTILE, "").replace(literal(bundles.HOSTILE), "").replace(shown(bundles.HOSTILE), "")
            assert not re.search(r"\{\{|\{%|%\}|\{#|Undefined", text), path


def test_the_package_says_what_was_not_done(package):
    _, result = package
    readme = (result.path / "README.md").read_text()
    assert "**Not compiled here, and not run**" in readme
    assert "`verified` in isthmus's interpreter of ML Programs, and `not run` in Core ML on a device" in readme
    assert NOT_COMPILED in result.notes
    assert "not compiled here" in interface(result).lower()
    assert NOT_COMPILED in json.loads((result.path / "isthmus.json").read_text())["notes"]


def test_the_files_named_in_package_swift_exist(package):
    _, result = package
    text = (result.path / "Package.swift").read_text()
    for name in re.findall(r'\.copy\("(Resources/[^"]+)"\)', text):
        assert (result.path / "Sources" / result.name / name).exists()
    assert (result.path / "Tests" / f"{result.name}Tests" / "Golden" / "index.json").is_file()
    assert {path.name for path in (result.path / "Sources").iterdir()} == {result.name, f"{result.name}Tool"}


def test_every_plain_file_is_used(packages):
    plain = {path.name for path in (RUNTIME / "Sources").glob("*.swift")}
    used = {path.name for path in (packages["sampler"][1].path / "Sources" / "DitDigits").glob("*.swift")}
    assert used == plain | {"Interface.swift"}
    without = {path.name for path in (packages["fixed"][1].path / "Sources" / "DitTiny").glob("*.swift")}
    assert without == plain - {"Sampling.swift"} | {"Interface.swift"}


# It is this model's.


def test_the_artifact_and_the_golden_values_are_the_bundles(package):
    folder, result = package
    for path in folder.rglob("*.mlpackage/**/*"):
        if path.is_file():
            assert (result.path / "Sources" / result.name / "Resources" / path.relative_to(folder)).read_bytes() == path.read_bytes()
    golden = result.path / "Tests" / f"{result.name}Tests" / "Golden"
    index = json.loads((golden / "index.json").read_text())
    dtypes = {"float32": "<f4", "int32": "<i4", "bool": "?"}
    manifest = read_manifest(folder)
    states = manifest.details.get("state_outputs", {})  # the package's name of each, and PyTorch's of what it is after a call
    for file, key, kept, infos in (
        (INPUTS, "inputs", "states", manifest.inputs),
        (OUTPUTS, "outputs", "statesAfter", manifest.outputs),
    ):
        cases = read_cases(folder / file)
        assert [case["name"] for case in index["cases"]] == list(cases)
        names = [info.name for info in infos]
        called = dict(zip(names, package_names(names), strict=True)) | {output: state for state, output in states.items()}
        for case in index["cases"]:
            written = {t["name"]: t for t in (*case[key], *case.get(kept, []))}
            assert list(written) == [called[name] for name in names]
            assert {t["name"] for t in case.get(kept, [])} == set(states)
            for name in names:
                tensor = written[called[name]]
                got = np.frombuffer((golden / tensor["file"]).read_bytes(), dtypes[tensor["type"]]).reshape(tensor["shape"])
                np.testing.assert_array_equal(got, cases[case["name"]][name])


def test_types_come_from_the_manifest(packages):
    text = interface(packages["integers"][1])
    for field in ("ids: Tensor<Int32>", "mask: Tensor<Bool>", "half: Tensor<Float>", "u: Tensor<Int32>", "classes: Tensor<Int32>"):
        assert field in text
    value = description(packages["integers"][1])
    assert value["inputs"][0]["sizes"] == [{"name": "batch", "least": 1, "most": 8, "only": [1, 2, 8]}, {"least": 4, "most": 4}]
    assert value["tolerance"] == {"maxRelative": 0.01, "minPSNR": 60.0}


def test_platforms_and_compute_units_come_from_the_options(packages):
    wanted = {
        "fixed": ('.macOS("15.0"), .iOS("18.0"), .tvOS("18.0"), .visionOS("2.0")', "cpu-and-ne"),
        "integers": ('.macOS("13.0"), .iOS("16.0"), .tvOS("16.0"), .visionOS("1.0")', "all"),
        "several": ('.macOS("26.0"), .iOS("26.0"), .tvOS("26.0"), .visionOS("26.0")', "cpu-only"),
    }
    for name, (platforms, units) in wanted.items():
        result = packages[name][1]
        assert f"platforms: [{platforms}]" in (result.path / "Package.swift").read_text()
        assert description(result)["computeUnits"] == units
        # Every choice that the options have is one of Swift's.
        assert f'"{units}"' in (RUNTIME / "Sources" / "Description.swift").read_text() or units == "all"


def test_states_are_described(packages):
    result = packages["states"][1]
    assert description(result)["states"] == [{"name": "cache", "type": "float32", "sizes": [{"least": n, "most": n} for n in (1, 2, 32)]}]
    assert "makeState()" in (result.path / "README.md").read_text()
    assert "makeState()" not in (packages["fixed"][1].path / "README.md").read_text()


def test_states_are_neither_inputs_nor_outputs(packages):
    value = description(packages["states"][1])
    assert [feature["name"] for feature in value["inputs"] + value["outputs"]] == ["token", "out"]
    assert "cache" not in interface(packages["states"][1])


def test_states_of_a_bundle_that_does_not_name_them(tmp_path):
    folder = bundles.states(tmp_path / "bundle")
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.model_copy(update={"details": {"state_outputs": {"cache": "cache_after"}}}))
    with pytest.raises(IntegrityError, match="outputs of states that it does not name: cache"):
        embed(folder, "swift", tmp_path / "package")


def test_names_are_those_of_the_package(packages):
    """A word of MIL's is called otherwise in the package; in Swift people find PyTorch's name."""
    value = description(packages["hostile"][1])
    names = [*("hidden_states", "hiddenStates", "hidden_states_1"), "tensor_"]
    assert set(names) <= {feature["name"] for feature in value["inputs"]}
    assert "public var tensor_: Tensor<Float>" in interface(packages["hostile"][1])
    assert "/// hidden.states: float32 [2]" in interface(packages["hostile"][1])
    assert (
        "| input | `hidden.states (hidden_states_1 in the package)` | `hiddenStates_3` |"
        in (packages["hostile"][1].path / "README.md").read_text()
    )


def test_functions_are_described(packages):
    value = description(packages["functions"][1])
    assert [f["name"] for f in value["functions"]] == ["main", "x_1x3_pairs_2", "x_8x3_pairs_16"]
    assert value["functions"][1]["shapes"] == {"x": [1, 3], "pairs": [2], "scale": [1]}
    assert value["inputs"][0]["sizes"][0] == {"name": "batch", "least": 1, "most": 8, "only": [1, 2, 8]}
    assert value["inputs"][1]["sizes"] == [{"name": "2*batch", "least": 2, "most": 16, "only": [2, 4, 16]}]
    assert "functions" not in description(packages["fixed"][1])
    assert "The package has 3 functions" in (packages["functions"][1].path / "README.md").read_text()


def test_several_functions_with_states_are_refused(tmp_path):
    folder = bundles.states(tmp_path / "bundle")
    manifest = read_manifest(folder)
    details = {**manifest.details, "functions": {"main": {"token": [1, 4]}, "other": {"token": [2, 4]}}}
    write_manifest(folder, manifest.model_copy(update={"details": details}))
    with pytest.raises(UnsupportedError, match="several functions keep states"):
        embed(folder, "swift", tmp_path / "package")


def test_several_packages_are_run_in_order(packages):
    assert description(packages["several"][1])["packages"] == ["part0.mlpackage", "part1.mlpackage"]
    assert description(packages["several"][1])["outputs"][1] == {"name": "b", "type": "float32", "sizes": []}


def test_compiled_packages_are_kept_by_content(packages, tmp_path):
    digests = {description(result)["digest"] for _, result in packages.values()}
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    assert len(digests) == 2  # all but `several` hold the same bytes


def test_the_same_bundle_gives_the_same_package(packages, tmp_path):
    folder, first = packages["sampler"]
    second = embed(folder, "swift", tmp_path / "again")
    assert [(name, (first.path / name).read_bytes()) for name in first.files] == [(n, (second.path / n).read_bytes()) for n in second.files]


# A text of the manifest is never code.


def strings(text):
    """Every string literal of a Swift file without what is in them, and the file without them."""
    data, literals, open_nodes = text.encode(), [], [PARSER.parse(text.encode()).root_node]
    while open_nodes:
        node = open_nodes.pop()
        if node.type == "line_string_literal":
            literals.append(data[node.start_byte : node.end_byte].decode())
            assert not any(child.type == "interpolated_expression" for child in node.children), literals[-1]
        else:
            open_nodes += node.children
    return literals


def test_hostile_names_are_literals_and_nothing_else(packages):
    _, result = packages["hostile"]
    text = interface(result)
    assert shown(bundles.HOSTILE) in text, "people see which input is meant"
    assert not {name for name in strings(text) if not re.fullmatch(r'"[A-Za-z_][A-Za-z0-9_]*"', name)}
    features = description(result)["inputs"] + description(result)["outputs"]
    assert {literal(feature["name"]) for feature in features} == set(strings(text))
    for name, source in sources(result).items():
        without = "".join(part for part in re.split(r'"[^"\n]*"|//[^\n]*', source))
        assert "print(1)" not in without, name
        assert "exit(1)" not in without, name
    assert not any(ord(c) > 126 or (ord(c) < 32 and c != "\n") for c in text)
    assert result.name.isalnum()
    names = re.findall(r"public (?:var|let) (\w+): Tensor", text)
    assert len(names) == 13 + 3
    assert len(set(names[:13])) == 13
    assert not {"self", "in", "init", "values", "tensor", "named"} & set(names)


@pytest.mark.parametrize("text", ['"', "\\(x)", "\\", "\n", "\r\n", "\u2028", "\0", "\ud800", "}", "#", '"""', "é", "\U0001f600", "\x7f"])
def test_a_literal_is_one_line_that_holds_the_text(text):
    written = literal(f"a{text}b")
    (found,) = strings(f"let x = {written}\n")
    assert found == written
    assert not faults(f"let x = {written}\n")
    read = re.sub(r"\\u\{([0-9a-f]+)\}", lambda m: chr(int(m.group(1), 16)), written[1:-1])
    assert read == f"a{text}b".replace("\ud800", "\ufffd")


def test_names():
    assert module_name("dit-digits") == "DitDigits"
    assert module_name("package.nets:make_unet") == "PackageNetsMakeUnet"
    assert module_name("42") == "Model42"
    assert module_name("swift") == "SwiftPackage"
    assert module_name("model") == "ModelPackage"
    assert module_name("") == module_name("é") == "ExportedModel"
    assert tool_name("DiT_XL/2") == "dit-xl-2-tool"
    assert tool_name("") == "tool"
    assert identifiers(["x", "X", "hidden_states", "class", "2d", "é"]) == ["x", "x_2", "hiddenStates", "class_", "value2d", "value"]


def test_no_module_hides_a_type_of_its_own():
    declared = re.compile(r"^(?:public |final )*(?:actor|struct|enum|class|protocol) (\w+)", re.MULTILINE)
    for path in (RUNTIME / "Sources").glob("*.swift"):
        for name in declared.findall(path.read_text()):
            if name not in ("TensorOperation", "TakeRows", "RepeatRow"):
                assert module_name(name) != name, name


# The sampler.


def formula(sampler):
    def step(inputs):
        others = {name: array for name, array in inputs.items() if name not in ("x", "t")}
        return {"sample": answer(inputs["x"], float(inputs["t"][0]), others)}

    return step


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_reference_of_the_sampler_is_the_sampler(method, guidance):
    sampler = RectifiedFlowSampler(
        shape=(1, 4, 4), labels=(0, 1, 2), names=("a", "b", "c"), null_label=3, guidance=guidance, steps=7, method=method
    )
    inputs, outputs = sampler.loop_case(formula(sampler), np.random.Generator(np.random.PCG64(3)))
    got = integrate(sampler.loop(), inputs["noise"], [], {"y": inputs["y"]})
    np.testing.assert_array_equal(got, outputs["latents"])


def test_the_samplers_numbers_are_float32s(packages):
    value = description(packages["sampler"][1])["sampler"]
    loop = MODELS["dit-digits"].spec().sampler.loop()
    assert len(value["calls"]) == len(loop.calls) == 20
    for written, call in zip(value["calls"], loop.calls, strict=True):
        for key in ("time", "change", "keep", "previous", "noise"):
            assert written[key] == float(np.float32(getattr(call, key)))
    assert value["null"] == [{"name": "y", "type": "int32", "shape": [1], "values": [10.0]}]
    assert (value["latent"], value["time"], value["output"], value["guidance"]) == ("x", "t", "sample", 1.5)


def test_step_noise_is_written(packages, tmp_path):
    folder, _ = packages["sampler"]
    calls = (LoopCall(time=1.0, change=1.0, keep=0.0, noise=0.5), LoopCall(time=0.5, change=1.0))
    write_golden(folder, tmp_path / "golden", Interface.of(read_manifest(folder)), LoopSampler(calls=calls))
    index = json.loads((tmp_path / "golden" / "index.json").read_text())["sampler"]
    (step,), (condition,) = index["stepNoise"], index["conditions"]
    noise, further, latents = (
        np.fromfile(tmp_path / "golden" / entry["file"], "<f4").reshape(3, 1, 8, 8) for entry in (index["noise"], step, index["latents"])
    )
    conditions = {"y": np.fromfile(tmp_path / "golden" / condition["file"], "<i4")}
    first = answer(noise, 1.0, conditions) + np.float32(0.5) * further
    np.testing.assert_array_equal(latents, first + answer(first, 0.5, conditions))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, "shapes of the model's inputs"),
        ({"weights": {"origin": "random"}}, "comes without a sampler"),
        ({"details": {"states": [{"name": "s", "dtype": "float16", "shape": (1,)}]}}, "are not those of its sampler"),
    ],
)
def test_a_sampler_of_other_inputs_is_left_out(tmp_path, change, why):
    folder = bundles.sampler(tmp_path / "bundle")
    manifest = read_manifest(folder)
    if not change:
        shapes = {i.name: (4, 2) if i.name == "y" else i.shape for i in manifest.inputs}
        change = {"inputs": [{"name": i.name, "dtype": i.dtype, "shape": shapes[i.name]} for i in manifest.inputs]}
        cases = read_cases(folder / INPUTS)
        write_cases(folder / INPUTS, {case: {**a, "y": np.stack([a["y"]] * 2, 1)} for case, a in cases.items()})
    write_manifest(folder, type(manifest).model_validate({**manifest.model_dump(by_alias=True), **change}))
    result = embed(folder, "swift", tmp_path / "package")
    assert any(why in note for note in result.notes)
    assert not (result.path / "Sources" / result.name / "Sampling.swift").exists()
    assert "sampler" not in description(result)
    assert not any(faults(text) for text in sources(result).values())


# What it refuses.


def test_values_that_core_ml_has_no_type_for(tmp_path):
    folder = bundles.write(tmp_path / "bundle", {"x": ("complex64", (2,))}, {"y": ("complex128", (2,))})
    with pytest.raises(UnsupportedError) as caught:
        embed(folder, "swift", tmp_path / "package")
    assert [reason.where for reason in caught.value.reasons] == ["x", "y"]
    assert not (tmp_path / "package").exists()


def test_integers_beyond_32_bits(tmp_path):
    folder = bundles.write(tmp_path / "bundle", {"x": ("int64", (2,))}, {"y": ("int64", (2,))})
    cases = read_cases(folder / INPUTS)
    cases["second"]["x"][1] = 2**31
    write_cases(folder / INPUTS, cases)
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(UnsupportedError, match="do not fit into Core ML's 32-bit integers"):
        embed(folder, "swift", tmp_path / "package")
    assert list(tmp_path.iterdir()) == [folder]
    assert converted("x", np.int64([2**31 - 1, -(2**31)])).tolist() == [2**31 - 1, -(2**31)]
    assert [scalar_type(name) for name in ("float64", "bfloat16", "uint8", "bool", "bool_", "complex64")] == [
        "float32", "float32", "int32", "bool", "bool", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"details": {"packages": ["../model.mlpackage"]}}, "names a package '../model.mlpackage'"),
        ({"details": {"packages": ["other.mlpackage"]}}, "holds no file of other.mlpackage"),
        ({"details": {"packages": [3]}}, "names a package 3"),
        ({"details": {"states": [{"name": "s"}]}}, "the manifest cannot be used"),
        ({"options": {"coreml": {"compute_units": "gpu"}}}, "the manifest cannot be used"),
        ({"sizes": {}}, "has no range for the size 'tokens'"),
    ],
)
def test_a_manifest_that_contradicts_itself(tmp_path, change, message):
    folder = bundles.several(tmp_path / "bundle")
    manifest = read_manifest(folder)
    write_manifest(folder, type(manifest).model_validate({**manifest.model_dump(by_alias=True), **change}))
    assert (folder / MANIFEST).is_file()
    with pytest.raises(IntegrityError, match=re.escape(message)):
        embed(folder, "swift", tmp_path / "package")
    assert not (tmp_path / "package").exists()
