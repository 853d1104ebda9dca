import Foundation

/// What can be wrong with a call, or with this package.
public enum ModelError: Error, Sendable, Equatable {
    /// A tensor's number of values is not the product of its sizes.
    case wrongCount(shape: [Int], count: Int)
    /// A tensor has another shape than the model takes, or gives.
    case wrongShape(name: String, got: [Int], expected: String)
    /// A tensor's values are of another type.
    case wrongType(name: String, got: ScalarType, expected: ScalarType)
    /// One named size has two values in one call.
    case contradictorySizes(size: String, first: Int, second: Int)
    /// The package has several functions, and none for inputs of these shapes.
    case noFunction(got: String, known: [String])
    /// A value is missing among the inputs or the outputs.
    case missing(name: String)
    /// Core ML wants, or gives, a type of values that this package does not convert.
    case unsupportedType(name: String, type: String)
    /// A resource of this package is not there, or cannot be read.
    case resource(name: String, problem: String)
    /// The model keeps a state between predictions, and was called without one, or with another model's.
    case state(problem: String)
    /// There is no sampler, or it was asked for something that it cannot do.
    case sampler(problem: String)
}

extension ModelError: LocalizedError {
    public var errorDescription: String? {
        switch self {
        case .wrongCount(let shape, let count):
            "a tensor of shape \(shape) was given \(count) values, expected \(shape.reduce(1, *))"
        case .wrongShape(let name, let got, let expected):
            "\(name) has the shape \(got), expected \(expected)"
        case .wrongType(let name, let got, let expected):
            "\(name) holds \(got.rawValue), expected \(expected.rawValue)"
        case .contradictorySizes(let size, let first, let second):
            "the size \(size) is \(first) in one input and \(second) in another, expected the same in all"
        case .noFunction(let got, let known):
            "no function takes inputs of the shapes \(got), expected those of one of \(known.joined(separator: ", "))"
        case .missing(let name):
            "\(name) is missing"
        case .unsupportedType(let name, let type):
            "\(name) is of Core ML's type \(type), which is not converted on this device"
        case .resource(let name, let problem):
            "the resource \(name): \(problem)"
        case .state(let problem), .sampler(let problem):
            problem
        }
    }
}
