import Foundation

/// Bounds on how far an output may be from its reference. Every one that is set has to hold.
public struct Tolerance: Sendable, Codable {
    /// On max |error| / (max reference - min reference).
    public let maxRelative: Double?
    /// On the PSNR in dB, peak = the reference's range.
    public let minPSNR: Double?
    /// With `rtol`: |error| <= atol + rtol |reference|, for each value.
    public let atol: Double?
    public let rtol: Double?

    public init(maxRelative: Double? = nil, minPSNR: Double? = nil, atol: Double? = nil, rtol: Double? = nil) {
        self.maxRelative = maxRelative
        self.minPSNR = minPSNR
        self.atol = atol
        self.rtol = rtol
    }
}

/// How far one output is from its reference, in double precision.
public struct Accuracy: Sendable {
    /// max |error|.
    public let maxAbsolute: Double
    /// max |error| / range of the reference; infinite where that is 0 and there is an error.
    public let maxRelative: Double
    /// 20 log10(range / rms error) in dB; infinite where there is no error.
    public let psnr: Double
    /// max of |error| / (atol + rtol |reference|); nil where neither is set.
    public let excess: Double?
    /// Why the numbers cannot be trusted: another shape, another type, NaN or infinity; empty when they can.
    public let problem: String
    /// Integers and booleans have to be equal, unless atol or rtol is set.
    public let isExact: Bool

    public init(reference: Value, candidate: Value, tolerance: Tolerance) {
        isExact = reference.type != .float32
        var problem = ""
        if reference.type != candidate.type {
            problem = "the values are \(candidate.type.rawValue), expected \(reference.type.rawValue)"
        } else if reference.shape != candidate.shape {
            problem = "the shape is \(candidate.shape), expected \(reference.shape)"
        }
        let expected = reference.doubles
        let got = candidate.doubles
        if problem.isEmpty, !(expected.allSatisfy(\.isFinite) && got.allSatisfy(\.isFinite)) {
            problem = "there are NaN or infinite values"
        }
        self.problem = problem
        let bounded = tolerance.atol != nil || tolerance.rtol != nil
        guard problem.isEmpty else {
            (maxAbsolute, maxRelative, psnr) = (.infinity, .infinity, -.infinity)
            excess = bounded ? .infinity : nil
            return
        }
        var largest = 0.0
        var squares = 0.0
        var worst = 0.0
        for (x, y) in zip(expected, got) {
            let error = abs(y - x)
            largest = max(largest, error)
            squares += error * error
            worst = max(worst, Self.ratio(error, (tolerance.atol ?? 0) + (tolerance.rtol ?? 0) * abs(x)))
        }
        let range = (expected.max() ?? 0) - (expected.min() ?? 0)
        maxAbsolute = largest
        maxRelative = Self.ratio(largest, range)
        if squares == 0 {
            psnr = .infinity
        } else {
            psnr = range == 0 ? -.infinity : 10 * (log10(range * range * Double(expected.count)) - log10(squares))
        }
        excess = bounded ? worst : nil
    }

    /// Every bound that is not kept, with what was got and what was expected. A NaN keeps no bound.
    public func misses(_ tolerance: Tolerance) -> [String] {
        if !problem.isEmpty { return [problem] }
        if isExact, excess == nil {
            return maxAbsolute == 0 ? [] : ["values differ by up to \(maxAbsolute), expected equal ones"]
        }
        var found: [String] = []
        if let bound = tolerance.maxRelative, !(maxRelative <= bound) {
            found.append("max |error| / range is \(maxRelative), expected at most \(bound)")
        }
        if let bound = tolerance.minPSNR, !(psnr >= bound) {
            found.append("PSNR is \(psnr) dB, expected at least \(bound) dB")
        }
        if let excess, !(excess <= 1) {
            found.append("|error| is up to \(excess) times atol + rtol |reference|, expected at most 1")
        }
        return found
    }

    /// The quotient of values of at least 0, with 0 / 0 = 0 and x / 0 infinite.
    private static func ratio(_ numerator: Double, _ denominator: Double) -> Double {
        numerator == 0 ? 0 : numerator / denominator
    }
}

extension Value {
    /// The values in double precision, which holds each of them exactly.
    var doubles: [Double] {
        switch self {
        case .float32(let tensor): tensor.scalars.map(Double.init)
        case .int32(let tensor): tensor.scalars.map(Double.init)
        case .bool(let tensor): tensor.scalars.map { $0 ? 1 : 0 }
        }
    }
}
