// Goes into the tests of the package `states` of swift_bundles.py: what is done with a state, around the stand-in.

import CoreML
import XCTest

@testable import Rwkv

final class StateTests: XCTestCase {
    func testAStateBelongsToItsModel() async throws {
        let golden = try Golden.here()
        let inputs = try golden.read(golden.cases[0].inputs)
        let (one, other) = (try await Model.load(), try await Model.load())
        let state = try await one.makeState()
        let outputs = try await one.predict(Model.Inputs(named: inputs), using: state)
        XCTAssertEqual(outputs.out.shape, [1, 4])
        do {
            _ = try await other.predict(named: inputs, using: state)
            XCTFail("another model's state was taken")
        } catch ModelError.state {}
        do {
            _ = try await one.predict(named: inputs)
            XCTFail("a model that keeps a state ran without one")
        } catch ModelError.state {}
    }

    func testABufferIsWritten() async throws {
        let model = try await Model.load()
        let state = try await model.makeState()
        let values = try Tensor(shape: [1, 2, 32], scalars: (0..<64).map { Float($0) / 2 })
        try await model.write(.float32(values), to: "cache", of: state)
        do {
            try await model.write(.float32(values), to: "other", of: state)
            XCTFail("a buffer that does not exist was written")
        } catch ModelError.missing {}
        do {
            try await model.write(.float32(Tensor(repeating: 0, shape: [64])), to: "cache", of: state)
            XCTFail("a buffer of another shape was written")
        } catch ModelError.wrongShape {}
    }

    func testValuesAreWrittenInEveryTypeAndStride() throws {
        let tensor = try Tensor(shape: [2, 3], scalars: [-2, -1, 0, 1, 2, 3] as [Float])
        for type in [MLMultiArrayDataType.float32, .float16] {
            let array = try XCTUnwrap(Value.float32(tensor).feature(name: "x", type: type).multiArrayValue)
            XCTAssertEqual(MLShapedArray<Float>(converting: array).scalars, tensor.scalars)
        }
        XCTAssertThrowsError(try Value.float32(tensor).feature(name: "x", type: .int32))
        XCTAssertThrowsError(try Value.float32(tensor).feature(name: "x", type: .int8))
        let booleans = try Value.bool(Tensor(shape: [2], scalars: [true, false])).feature(name: "b", type: .int32)
        XCTAssertEqual(MLShapedArray<Int32>(converting: try XCTUnwrap(booleans.multiArrayValue)).scalars, [1, 0])
    }
}
