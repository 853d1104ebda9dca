// What goes into the model and what comes out of it. Nothing here needs Core ML.

/// A dense tensor in row-major order.
public struct Tensor<Scalar: Sendable & Equatable>: Sendable, Equatable {
    /// Size of each axis; empty for a single value.
    public let shape: [Int]
    /// The values, the last axis contiguous.
    public var scalars: [Scalar]

    /// - Throws: `ModelError.wrongCount` when the number of values is not the product of the sizes.
    public init(shape: [Int], scalars: [Scalar]) throws {
        guard shape.allSatisfy({ $0 >= 0 }), shape.reduce(1, *) == scalars.count else {
            throw ModelError.wrongCount(shape: shape, count: scalars.count)
        }
        self.shape = shape
        self.scalars = scalars
    }

    /// A tensor of one value everywhere.
    public init(repeating value: Scalar, shape: [Int]) {
        precondition(shape.allSatisfy { $0 >= 0 }, "a size is negative: \(shape)")
        self.shape = shape
        scalars = Array(repeating: value, count: shape.reduce(1, *))
    }

    /// Values of one row, an entry of the first axis.
    var rowCount: Int { shape.dropFirst().reduce(1, *) }

    /// Rows of the first axis, `first` of them at least: the last row is repeated where there are too few.
    func rows(_ range: Range<Int>, padded count: Int) -> Tensor {
        var taken = Array(scalars[range.lowerBound * rowCount..<range.upperBound * rowCount])
        let last = Array(scalars[(range.upperBound - 1) * rowCount..<range.upperBound * rowCount])
        for _ in range.count..<max(count, range.count) {
            taken += last
        }
        return Tensor(unchecked: [max(count, range.count)] + shape.dropFirst(), taken)
    }

    /// The rows of both, one after the other. Their other sizes are equal.
    func appending(_ other: Tensor) -> Tensor {
        Tensor(unchecked: [shape[0] + other.shape[0]] + shape.dropFirst(), scalars + other.scalars)
    }

    /// One row, repeated.
    func repeated(_ count: Int) -> Tensor {
        Tensor(unchecked: [count] + shape.dropFirst(), Array(repeatElement(scalars, count: count).joined()))
    }

    /// The first rows.
    func first(_ count: Int) -> Tensor {
        Tensor(unchecked: [count] + shape.dropFirst(), Array(scalars.prefix(count * rowCount)))
    }

    private init(unchecked shape: [Int], _ scalars: [Scalar]) {
        self.shape = shape
        self.scalars = scalars
    }
}

/// A tensor of one of the three types that a model's values have here.
public enum Value: Sendable, Equatable {
    case float32(Tensor<Float>)
    case int32(Tensor<Int32>)
    case bool(Tensor<Bool>)

    public var shape: [Int] {
        switch self {
        case .float32(let tensor): tensor.shape
        case .int32(let tensor): tensor.shape
        case .bool(let tensor): tensor.shape
        }
    }

    public var type: ScalarType {
        switch self {
        case .float32: .float32
        case .int32: .int32
        case .bool: .bool
        }
    }

    /// The same operation on whichever tensor this is.
    func map(_ operation: some TensorOperation) -> Value {
        switch self {
        case .float32(let tensor): .float32(operation(tensor))
        case .int32(let tensor): .int32(operation(tensor))
        case .bool(let tensor): .bool(operation(tensor))
        }
    }

    /// The rows of both, one after the other.
    /// - Throws: `ModelError.wrongShape` when their types or other sizes differ.
    func appending(_ other: Value, name: String) throws -> Value {
        guard shape.dropFirst() == other.shape.dropFirst(), !shape.isEmpty, !other.shape.isEmpty else {
            throw ModelError.wrongShape(name: name, got: other.shape, expected: "rows like those of \(shape)")
        }
        switch (self, other) {
        case (.float32(let a), .float32(let b)): return .float32(a.appending(b))
        case (.int32(let a), .int32(let b)): return .int32(a.appending(b))
        case (.bool(let a), .bool(let b)): return .bool(a.appending(b))
        default: throw ModelError.wrongType(name: name, got: other.type, expected: type)
        }
    }
}

extension Tensor {
    /// The tensor of that name.
    /// - Throws: `ModelError` when it is missing, or of another type.
    init(_ name: String, of values: [String: Value]) throws {
        guard let value = values[name] else { throw ModelError.missing(name: name) }
        let found: Any
        switch value {
        case .float32(let tensor): found = tensor
        case .int32(let tensor): found = tensor
        case .bool(let tensor): found = tensor
        }
        guard let tensor = found as? Tensor<Scalar> else {
            let expected: ScalarType = Scalar.self == Float.self ? .float32 : Scalar.self == Int32.self ? .int32 : .bool
            throw ModelError.wrongType(name: name, got: value.type, expected: expected)
        }
        self = tensor
    }
}

/// An operation that does not depend on the type of the values.
protocol TensorOperation {
    func callAsFunction<Scalar>(_ tensor: Tensor<Scalar>) -> Tensor<Scalar>
}

/// See `Tensor.rows`.
struct TakeRows: TensorOperation {
    let range: Range<Int>
    let count: Int

    func callAsFunction<Scalar>(_ tensor: Tensor<Scalar>) -> Tensor<Scalar> {
        tensor.rows(range, padded: count)
    }
}

/// See `Tensor.repeated`.
struct RepeatRow: TensorOperation {
    let count: Int

    func callAsFunction<Scalar>(_ tensor: Tensor<Scalar>) -> Tensor<Scalar> {
        tensor.repeated(count)
    }
}

/// The types of values. Core ML has neither int64 nor bool: such values are int32 and bool here, and converted on the way.
public enum ScalarType: String, Sendable, Codable {
    case float32
    case int32
    case bool
}
