@preconcurrency import CoreML
import Foundation

extension Value {
    /// The value as Core ML takes it, in the type that the package declares.
    func feature(name: String, type: MLMultiArrayDataType) throws -> MLFeatureValue {
        // Core ML has no tensors without axes.
        let array = try MLMultiArray(shape: (shape.isEmpty ? [1] : shape).map { NSNumber(value: $0) }, dataType: type)
        try write(to: array, name: name)
        return MLFeatureValue(multiArray: array)
    }

    /// Writes every value into an array of as many.
    func write(to array: MLMultiArray, name: String) throws {
        let lengths = array.shape.map(\.intValue)
        guard lengths == (shape.isEmpty ? [1] : shape) else {
            throw ModelError.wrongShape(name: name, got: shape, expected: "\(lengths)")
        }
        let type = array.dataType
        if type == .int32, self.type == .float32 {
            throw ModelError.wrongType(name: name, got: .float32, expected: .int32)
        }
        try array.withUnsafeMutableBytes { bytes, strides in
            try store(bytes, lengths, strides, as: type, name: name)
        }
    }

    private func store(
        _ bytes: UnsafeMutableRawBufferPointer, _ lengths: [Int], _ strides: [Int], as type: MLMultiArrayDataType, name: String
    ) throws {
        switch type {
        case .float32: store(bytes, lengths, strides) { Float($0) }
        case .double: store(bytes, lengths, strides) { $0 }
        case .int32: store(bytes, lengths, strides) { Int32($0) }
        case .float16:
            // Macs with Intel processors have no Float16.
            #if !((os(macOS) || targetEnvironment(macCatalyst)) && arch(x86_64))
            store(bytes, lengths, strides) { Float16($0) }
            #else
            throw ModelError.unsupportedType(name: name, type: "float16")
            #endif
        default: throw ModelError.unsupportedType(name: name, type: "\(type.rawValue)")
        }
    }

    /// Writes row by row: the values are contiguous here, and need not be there.
    private func store<Scalar>(
        _ bytes: UnsafeMutableRawBufferPointer, _ lengths: [Int], _ strides: [Int], _ convert: (Double) -> Scalar
    ) {
        let values = doubles
        let target = bytes.bindMemory(to: Scalar.self)
        let length = lengths[lengths.count - 1]
        let step = strides[lengths.count - 1]
        guard length > 0 else { return }
        for row in 0..<values.count / length {
            var offset = 0
            var rest = row
            for axis in (0..<lengths.count - 1).reversed() {
                offset += rest % lengths[axis] * strides[axis]
                rest /= lengths[axis]
            }
            for column in 0..<length {
                target[offset + column * step] = convert(values[row * length + column])
            }
        }
    }

    /// What Core ML gave, in the type and with the axes that the manifest declares.
    init(_ array: MLMultiArray, as feature: Feature) throws {
        var shape = array.shape.map(\.intValue)
        if feature.sizes.isEmpty, shape == [1] {
            shape = []
        }
        switch feature.type {
        case .float32:
            self = .float32(try Tensor(shape: shape, scalars: MLShapedArray<Float>(converting: array).scalars))
        case .int32:
            self = .int32(try Tensor(shape: shape, scalars: MLShapedArray<Int32>(converting: array).scalars))
        case .bool:
            self = .bool(try Tensor(shape: shape, scalars: MLShapedArray<Int32>(converting: array).scalars.map { $0 != 0 }))
        }
    }
}
