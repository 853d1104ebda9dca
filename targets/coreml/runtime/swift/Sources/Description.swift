import CoreML
import Foundation

/// What the model takes and gives, and how it is run: the resource `model.json`.
public struct Description: Sendable, Codable {
    /// The name it was exported under.
    public let model: String
    /// The precision it was exported in.
    public let precision: String
    /// The packages, in the order in which they are run: each reads what the ones before it gave.
    public let packages: [String]
    /// sha256 of the packages' files: compiled packages are kept under this name.
    public let digest: String
    /// Where Core ML may run it: `all`, `cpu-and-ne`, `cpu-and-gpu` or `cpu-only`.
    public let computeUnits: String
    public let inputs: [Feature]
    public let outputs: [Feature]
    /// What the model keeps from one prediction to the next; empty for most.
    public let states: [Feature]
    /// The functions of the package, each for inputs of other shapes, the default one first; nil where there is one.
    public let functions: [Function]?
    /// How far an output may be from PyTorch's.
    public let tolerance: Tolerance
    /// How pictures are drawn; nil for a model without a sampler.
    public let sampler: Sampler?

    /// Reads the resource.
    public static func load() throws -> Description {
        guard let url = Bundle.module.url(forResource: "model", withExtension: "json") else {
            throw ModelError.resource(name: "model.json", problem: "not found in \(Bundle.module.bundlePath)")
        }
        do {
            return try JSONDecoder().decode(Description.self, from: Data(contentsOf: url))
        } catch {
            throw ModelError.resource(name: "model.json", problem: "\(error)")
        }
    }

    /// The manifest's choice, as Core ML has it.
    var units: MLComputeUnits {
        switch computeUnits {
        case "cpu-and-ne": .cpuAndNeuralEngine
        case "cpu-and-gpu": .cpuAndGPU
        case "cpu-only": .cpuOnly
        default: .all
        }
    }

    /// The function for inputs of these shapes; nil for a package that has one for all.
    func function(for values: [String: Value]) throws -> String? {
        guard let functions else { return nil }
        guard let function = functions.first(where: { $0.takes(values) }) else {
            throw ModelError.noFunction(
                got: values.mapValues(\.shape).sorted { $0.key < $1.key }.map { "\($0.key) \($0.value)" }.joined(separator: ", "),
                known: functions.map(\.name)
            )
        }
        return function.name
    }

    /// Refuses inputs that the model does not take, before Core ML sees them.
    public func check(_ values: [String: Value]) throws {
        var named: [String: Int] = [:]
        for feature in inputs {
            guard let value = values[feature.name] else { throw ModelError.missing(name: feature.name) }
            try feature.check(value)
            for (size, length) in zip(feature.sizes, value.shape) {
                guard let name = size.name else { continue }
                if let before = named.updateValue(length, forKey: name), before != length {
                    throw ModelError.contradictorySizes(size: name, first: before, second: length)
                }
            }
        }
    }
}

/// One of several functions of a package: the same model for inputs of fixed shapes.
public struct Function: Sendable, Codable {
    public let name: String
    /// The shape of each input in the package, where a single value has the shape [1].
    public let shapes: [String: [Int]]

    func takes(_ values: [String: Value]) -> Bool {
        for (name, shape) in shapes {
            guard let value = values[name], (value.shape.isEmpty ? [1] : value.shape) == shape else { return false }
        }
        return true
    }
}

/// An input, an output or a state.
public struct Feature: Sendable, Codable {
    public let name: String
    public let type: ScalarType
    public let sizes: [Size]

    /// The shape in words: `[2, 3]`, or `[batch 1...8, 3]`.
    public var shape: String { "[\(sizes.map(\.description).joined(separator: ", "))]" }

    func check(_ value: Value) throws {
        guard value.type == type else { throw ModelError.wrongType(name: name, got: value.type, expected: type) }
        guard value.shape.count == sizes.count, zip(sizes, value.shape).allSatisfy({ $0.allows($1) }) else {
            throw ModelError.wrongShape(name: name, got: value.shape, expected: shape)
        }
    }
}

/// The lengths that an axis may have.
public struct Size: Sendable, Codable, CustomStringConvertible {
    /// The name of a size that several inputs share; nil for a fixed one.
    public let name: String?
    public let least: Int
    public let most: Int
    /// The only lengths between these two that are taken; nil for all.
    public let only: [Int]?

    public init(name: String? = nil, least: Int, most: Int, only: [Int]? = nil) {
        (self.name, self.least, self.most, self.only) = (name, least, most, only)
    }

    public var description: String {
        guard least != most else { return "\(least)" }
        let lengths = only.map { "one of \($0)" } ?? "\(least)...\(most)"
        return name.map { "\($0) \(lengths)" } ?? lengths
    }

    func allows(_ length: Int) -> Bool {
        (least...most).contains(length) && (only?.contains(length) ?? true)
    }

    /// The length to call the model with for so many rows: more are cut, fewer are padded.
    func fitting(_ count: Int) -> Int {
        guard let only else { return min(max(count, least), most) }
        return only.sorted().first { $0 >= count } ?? most
    }
}
