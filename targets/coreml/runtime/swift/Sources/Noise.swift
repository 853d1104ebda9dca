import Foundation

/// Standard normal noise from a seed: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) and the Box-Muller transform, in double precision.
///
/// The same seed gives the same noise on every device, to the last bits of its `log`, `cos` and `sin`. It is **not** the noise of numpy's
/// PCG64, which the reports of isthmus draw with: pictures of the same seed differ from those. To draw the same pictures, hand the noise itself over.
public struct SeededNoise: Sendable {
    private var state: UInt64
    private var spare: Double?

    public init(seed: UInt64) {
        state = seed
    }

    /// The next value.
    public mutating func next() -> Float {
        if let value = spare {
            spare = nil
            return Float(value)
        }
        // 1 - u is in (0, 1]: its logarithm is finite.
        let radius = (-2 * log(1 - uniform())).squareRoot()
        let angle = 2 * Double.pi * uniform()
        spare = radius * sin(angle)
        return Float(radius * cos(angle))
    }

    /// A tensor of the next values.
    public mutating func tensor(shape: [Int]) -> Tensor<Float> {
        var noise = Tensor<Float>(repeating: 0, shape: shape)
        for index in noise.scalars.indices {
            noise.scalars[index] = next()
        }
        return noise
    }

    /// In [0, 1), a multiple of 2^-53.
    private mutating func uniform() -> Double {
        state &+= 0x9E37_79B9_7F4A_7C15
        var bits = state
        bits = (bits ^ (bits >> 30)) &* 0xBF58_476D_1CE4_E5B9
        bits = (bits ^ (bits >> 27)) &* 0x94D0_49BB_1331_11EB
        bits ^= bits >> 31
        return Double(bits >> 11) * 0x1p-53
    }
}
