import Foundation

/// Inputs and PyTorch's outputs for them: a folder with `index.json` and the values of each tensor in a file, raw and little-endian.
public struct Golden: Sendable {
    /// A tensor in a file of the folder. Booleans are one byte each.
    public struct File: Sendable, Codable {
        public let name: String
        public let type: ScalarType
        public let shape: [Int]
        public let file: String
    }

    public struct Case: Sendable, Codable {
        public let name: String
        public let inputs: [File]
        public let outputs: [File]
        /// What the model's states are before the call; nil for a model that keeps none.
        public let states: [File]?
        /// PyTorch's values of them after it.
        public let statesAfter: [File]?

        /// Everything that is compared.
        public var results: [File] { outputs + (statesAfter ?? []) }
    }

    /// The sampler around a model whose answer is a formula: half the latents, plus a thousandth of the time, plus a hundredth of the sum
    /// of the row's conditions.
    public struct Drawn: Sendable, Codable {
        public let noise: File
        public let stepNoise: [File]
        public let conditions: [File]
        public let latents: File
    }

    private struct Index: Codable {
        let cases: [Case]
        let sampler: Drawn?
    }

    public let folder: URL
    public let cases: [Case]
    public let sampler: Drawn?

    public init(folder: URL) throws {
        self.folder = folder
        let index = try JSONDecoder().decode(Index.self, from: Data(contentsOf: folder.appendingPathComponent("index.json")))
        (cases, sampler) = (index.cases, index.sampler)
    }

    /// The tensors by name.
    public func read(_ files: [File]) throws -> [String: Value] {
        try Dictionary(uniqueKeysWithValues: files.map { ($0.name, try read($0)) })
    }

    public func read(_ file: File) throws -> Value {
        try Value(contentsOf: folder.appendingPathComponent(file.file), type: file.type, shape: file.shape)
    }

    /// Runs the model on every case.
    ///
    /// - Returns: Each output of each case, and each state after it, with how far it is from PyTorch's, in order.
    public func compare(with model: Model) async throws -> [(name: String, accuracy: Accuracy)] {
        var found: [(name: String, accuracy: Accuracy)] = []
        for item in cases {
            let inputs = try read(item.inputs)
            var results: [String: Value]
            if model.description.states.isEmpty {
                results = try await model.predict(named: inputs)
            } else if #available(iOS 18, macOS 15, tvOS 18, visionOS 2, *) {
                let state = try await model.makeState()
                for file in item.states ?? [] {
                    try await model.write(try read(file), to: file.name, of: state)
                }
                results = try await model.predict(named: inputs, using: state)
                for file in item.statesAfter ?? [] {
                    results[file.name] = try await model.read(file.name, of: state)
                }
            } else {
                throw ModelError.state(problem: "states need iOS 18 or macOS 15")
            }
            for file in item.results {
                guard let candidate = results[file.name] else { throw ModelError.missing(name: file.name) }
                let accuracy = Accuracy(reference: try read(file), candidate: candidate, tolerance: model.description.tolerance)
                found.append(("\(item.name)/\(file.name)", accuracy))
            }
        }
        return found
    }
}

extension Value {
    /// Reads raw little-endian values.
    public init(contentsOf url: URL, type: ScalarType, shape: [Int]) throws {
        let data = try Data(contentsOf: url)
        let count = shape.reduce(1, *)
        let size = type == .bool ? 1 : 4
        guard data.count == count * size else {
            throw ModelError.resource(name: url.lastPathComponent, problem: "\(data.count) bytes, expected \(count * size)")
        }
        self = try data.withUnsafeBytes { bytes in
            func word(_ index: Int) -> UInt32 { UInt32(littleEndian: bytes.loadUnaligned(fromByteOffset: index * 4, as: UInt32.self)) }
            switch type {
            case .float32: return .float32(try Tensor(shape: shape, scalars: (0..<count).map { Float(bitPattern: word($0)) }))
            case .int32: return .int32(try Tensor(shape: shape, scalars: (0..<count).map { Int32(bitPattern: word($0)) }))
            case .bool: return .bool(try Tensor(shape: shape, scalars: bytes.map { $0 != 0 }))
            }
        }
    }

    /// The same values as bytes.
    public var bytes: Data {
        switch self {
        case .float32(let tensor): Data(tensor.scalars.flatMap { Self.littleEndian($0.bitPattern) })
        case .int32(let tensor): Data(tensor.scalars.flatMap { Self.littleEndian(UInt32(bitPattern: $0)) })
        case .bool(let tensor): Data(tensor.scalars.map { $0 ? 1 : 0 })
        }
    }

    private static func littleEndian(_ word: UInt32) -> [UInt8] {
        (0..<4).map { UInt8(truncatingIfNeeded: word >> (8 * UInt32($0))) }
    }
}
