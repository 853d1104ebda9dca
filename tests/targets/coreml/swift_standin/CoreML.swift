// A stand-in for Core ML, with the signatures of Apple's documentation (docs/swift.md lists them), so that the Swift package compiles on Linux.
// Its models compute nothing: `prediction` finds the case of the package's golden values (STANDIN_GOLDEN) whose inputs it was given, and gives
// its outputs, and the values of its states; or the latents themselves, when a sampler asks. STANDIN_WRONG adds an error to the outputs, STANDIN_HALF takes inputs in float16,
// STANDIN_FUNCTIONS names functions.

@_exported import Foundation

public enum MLComputeUnits: Int, Sendable {
    case cpuOnly, cpuAndGPU, all, cpuAndNeuralEngine
}

open class MLModelConfiguration: NSObject {
    public var computeUnits = MLComputeUnits.all
    public var functionName: String?
}

public class MLPredictionOptions: NSObject {}

public enum MLMultiArrayDataType: Int, Sendable {
    case double = 0x10040
    case float32 = 0x10020
    case float16 = 0x10010
    case int32 = 0x20020
    case int8 = 0x20008
}

/// The last axis is padded, so that only who reads the strides reads the right values.
public class MLMultiArray: NSObject {
    public let shape: [NSNumber]
    public let strides: [NSNumber]
    public let dataType: MLMultiArrayDataType
    private let bytes: UnsafeMutableRawBufferPointer

    public init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws {
        var steps = [Int](repeating: 1, count: shape.count)
        var length = 1
        for axis in shape.indices.reversed() {
            steps[axis] = length
            length *= shape[axis].intValue + (axis == shape.count - 1 ? 5 : 0)
        }
        self.shape = shape
        self.dataType = dataType
        strides = steps.map { NSNumber(value: $0) }
        bytes = .allocate(byteCount: max(length, 1) * 8, alignment: 16)
        bytes.initializeMemory(as: UInt8.self, repeating: 0xAA)
    }

    deinit { bytes.deallocate() }

    public var count: Int { shape.map(\.intValue).reduce(1, *) }

    public func withUnsafeMutableBytes<R>(_ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> R) rethrows -> R {
        try body(bytes, strides.map(\.intValue))
    }

    /// Of a value in row-major order.
    private func offset(_ index: Int) -> Int {
        var (found, rest) = (0, index)
        for axis in shape.indices.reversed() {
            found += rest % shape[axis].intValue * strides[axis].intValue
            rest /= shape[axis].intValue
        }
        return found
    }

    func value(_ index: Int) -> Double {
        switch dataType {
        case .float32: return Double(bytes.load(fromByteOffset: offset(index) * 4, as: Float.self))
        case .float16: return Double(bytes.load(fromByteOffset: offset(index) * 2, as: Float16.self))
        case .int32: return Double(bytes.load(fromByteOffset: offset(index) * 4, as: Int32.self))
        default: fatalError("\(dataType) is not part of the stand-in")
        }
    }

    func set(_ index: Int, _ value: Double) {
        switch dataType {
        case .float32: bytes.storeBytes(of: Float(value), toByteOffset: offset(index) * 4, as: Float.self)
        case .int32: bytes.storeBytes(of: Int32(value), toByteOffset: offset(index) * 4, as: Int32.self)
        default: fatalError("\(dataType) is not part of the stand-in")
        }
    }
}

public protocol MLShapedArrayScalar {
    init(_ value: Double)
}

extension Float: MLShapedArrayScalar {}
extension Int32: MLShapedArrayScalar {}

public struct MLShapedArray<Scalar: MLShapedArrayScalar> {
    public let shape: [Int]
    public let scalars: [Scalar]

    public init(converting multiArray: MLMultiArray) {
        shape = multiArray.shape.map(\.intValue)
        scalars = (0..<multiArray.count).map { Scalar(multiArray.value($0)) }
    }
}

public class MLFeatureValue: NSObject {
    public let multiArrayValue: MLMultiArray?

    public init(multiArray value: MLMultiArray) {
        multiArrayValue = value
    }
}

public protocol MLFeatureProvider {
    var featureNames: Set<String> { get }
    func featureValue(for featureName: String) -> MLFeatureValue?
}

public class MLDictionaryFeatureProvider: NSObject, MLFeatureProvider {
    private let values: [String: MLFeatureValue]

    public init(dictionary: [String: Any]) throws {
        guard let values = dictionary as? [String: MLFeatureValue] else { throw CocoaError(.coderInvalidValue) }
        self.values = values
    }

    public var featureNames: Set<String> { Set(values.keys) }

    public func featureValue(for featureName: String) -> MLFeatureValue? { values[featureName] }
}

public class MLMultiArrayConstraint: NSObject {
    public let dataType: MLMultiArrayDataType

    init(_ dataType: MLMultiArrayDataType) {
        self.dataType = dataType
    }
}

public class MLFeatureDescription: NSObject {
    public let multiArrayConstraint: MLMultiArrayConstraint?

    init(_ dataType: MLMultiArrayDataType) {
        multiArrayConstraint = MLMultiArrayConstraint(dataType)
    }
}

public class MLModelDescription: NSObject {
    public internal(set) var inputDescriptionsByName: [String: MLFeatureDescription] = [:]
    public internal(set) var stateDescriptionsByName: [String: MLFeatureDescription] = [:]
}

public class MLState: NSObject {
    fileprivate var buffers: [String: MLMultiArray] = [:]

    public func withMultiArray<R>(for stateName: String, _ body: (MLMultiArray) throws -> R) rethrows -> R {
        try body(buffers[stateName]!)
    }
}

public class MLModel: NSObject {
    private struct File: Codable {
        let name: String
        let type: String
        let shape: [Int]
        let file: String
    }

    private struct Case: Codable {
        let inputs: [File]
        let outputs: [File]
        let statesAfter: [File]?
    }

    private struct Index: Codable {
        let cases: [Case]
    }

    private static let environment = ProcessInfo.processInfo.environment
    public let modelDescription = MLModelDescription()
    private let folder: URL
    private let cases: [Case]

    private let function: String?

    private init(function: String?) {
        self.function = function
        folder = URL(fileURLWithPath: Self.environment["STANDIN_GOLDEN"]!)
        cases = try! JSONDecoder().decode(Index.self, from: Data(contentsOf: folder.appendingPathComponent("index.json"))).cases
        let floats = Self.environment["STANDIN_HALF"] == nil ? MLMultiArrayDataType.float32 : .float16
        for file in cases[0].inputs {
            modelDescription.inputDescriptionsByName[file.name] = MLFeatureDescription(file.type == "float32" ? floats : .int32)
        }
        modelDescription.stateDescriptionsByName["cache"] = MLFeatureDescription(.float16)
    }

    public class func load(contentsOf url: URL, configuration: MLModelConfiguration = MLModelConfiguration()) async throws -> MLModel {
        guard url.pathExtension == "mlmodelc", FileManager.default.fileExists(atPath: url.path) else { throw CocoaError(.fileNoSuchFile) }
        return MLModel(function: configuration.functionName)
    }

    public class func compileModel(at url: URL) async throws -> URL {
        let made = FileManager.default.temporaryDirectory.appendingPathComponent("\(UUID().uuidString).mlmodelc")
        try FileManager.default.copyItem(at: url, to: made)
        return made
    }

    @available(*, deprecated)
    public class func compileModel(at modelURL: URL) throws -> URL {
        fatalError("the method that is not async was chosen")
    }

    public func prediction(from input: any MLFeatureProvider) throws -> any MLFeatureProvider {
        try answer(input)
    }

    public func prediction(from input: any MLFeatureProvider, options: MLPredictionOptions) throws -> any MLFeatureProvider {
        fatalError("the method that is not async was chosen")
    }

    public func prediction(
        from input: any MLFeatureProvider, options: MLPredictionOptions = MLPredictionOptions()
    ) async throws -> any MLFeatureProvider {
        try answer(input)
    }

    public func makeState() -> MLState {
        let state = MLState()
        state.buffers["cache"] = try! MLMultiArray(shape: [1, 2, 32], dataType: .float16)
        return state
    }

    public func prediction(from inputFeatures: any MLFeatureProvider, using state: MLState) throws -> any MLFeatureProvider {
        let found = try answer(inputFeatures)
        for file in cases.first(where: { $0.inputs.allSatisfy { holds(inputFeatures, $0) } })?.statesAfter ?? [] {
            state.buffers[file.name] = try feature(file).multiArrayValue
        }
        return found
    }

    /// A package with several functions is asked for each by its name: STANDIN_FUNCTIONS has it for the rows of the first input.
    private func checkFunction(_ input: any MLFeatureProvider) {
        let rows = input.featureValue(for: cases[0].inputs[0].name)?.multiArrayValue?.shape[0].intValue ?? 0
        let wanted = Self.environment["STANDIN_FUNCTIONS"].map { text in
            text.split(separator: ",").first { $0.hasPrefix("\(rows)=") }.map { String($0.dropFirst("\(rows)=".count)) }
        }
        precondition(function == wanted ?? nil, "the function for \(rows) rows is \(function ?? "not named")")
    }

    private func answer(_ input: any MLFeatureProvider) throws -> any MLFeatureProvider {
        checkFunction(input)
        if let found = cases.first(where: { $0.inputs.allSatisfy { holds(input, $0) } }) {
            return try MLDictionaryFeatureProvider(dictionary: Dictionary(uniqueKeysWithValues: found.outputs.map { ($0.name, try feature($0)) }))
        }
        guard cases[0].outputs.map(\.name) == ["sample"], let latents = input.featureValue(for: "x") else { throw CocoaError(.fileReadUnknown) }
        return try MLDictionaryFeatureProvider(dictionary: ["sample": latents])
    }

    private func values(_ file: File) -> [Double] {
        let data = try! Data(contentsOf: folder.appendingPathComponent(file.file))
        switch file.type {
        case "bool": return data.map(Double.init)
        case "int32": return data.withUnsafeBytes { $0.bindMemory(to: Int32.self).map(Double.init) }
        default: return data.withUnsafeBytes { $0.bindMemory(to: Float.self).map(Double.init) }
        }
    }

    private func holds(_ input: any MLFeatureProvider, _ file: File) -> Bool {
        guard let array = input.featureValue(for: file.name)?.multiArrayValue else { return false }
        guard array.shape.map(\.intValue) == (file.shape.isEmpty ? [1] : file.shape) else { return false }
        let allowed = array.dataType == .float16 ? 1e-2 : 0
        return values(file).enumerated().allSatisfy { abs(array.value($0.offset) - $0.element) <= allowed }
    }

    private func feature(_ file: File) throws -> MLFeatureValue {
        let shape = (file.shape.isEmpty ? [1] : file.shape).map { NSNumber(value: $0) }
        let array = try MLMultiArray(shape: shape, dataType: file.type == "float32" ? .float32 : .int32)
        let error = Self.environment["STANDIN_WRONG"] != nil && file.type == "float32" ? 0.5 : 0
        for (index, value) in values(file).enumerated() {
            array.set(index, value + error)
        }
        return MLFeatureValue(multiArray: array)
    }
}
