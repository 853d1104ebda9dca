// How pictures are drawn: a fixed list of calls of the model, and what becomes of each answer. Nothing here needs Core ML.

/// One call of the model. With `out` its answer at the latents x, guided, `before` the answer of the call before, and `base` the latents of
/// the last call that advanced (the start at first), the next x is
///
///     keep * base + change * (out + previous * before) + noise * z,    z standard normal
///
/// Euler's method for rectified flows is `change` alone; Heun's adds a second call at the same base, which takes the mean of two answers.
public struct SamplerCall: Sendable, Codable {
    /// What the model's time input gets, in each row.
    public let time: Float
    public let change: Float
    public let keep: Float
    public let previous: Float
    public let noise: Float
    /// The result is the base of the next call. False for a predictor.
    public let advances: Bool
}

/// A sampler of a fixed number of calls, with classifier-free guidance (Ho and Salimans, arXiv:2207.12598): one call on a doubled batch, the
/// conditions' rows first, then as many of the null condition; the answer is null + guidance * (given - null).
public struct Sampler: Sendable, Codable {
    public let calls: [SamplerCall]
    /// At least 1; with 1 there are no null rows.
    public let guidance: Float
    /// The null condition: one row for each input beside the latents and the time.
    public let null: [NullRow]
    /// Standard deviation of the starting latents.
    public let start: Float
    /// Names of the model's inputs for the latents (rows, …) and the time (rows), and of its output, shaped like the latents.
    public let latent: String
    public let time: String
    public let output: String

    /// How far the sampler is.
    public struct Progress: Sendable, Equatable {
        public let completed: Int
        public let total: Int
        public var fraction: Double { Double(completed) / Double(total) }
    }

    /// One call of the model.
    public typealias Step = @Sendable ([String: Value]) async throws -> [String: Value]

    /// Integrates from noise to latents.
    ///
    /// - Parameters:
    ///   - noise: Standard normal, (N, …): N pictures.
    ///   - stepNoise: As much again for each call that adds some, in order; most samplers add none.
    ///   - conditions: The model's other inputs by name, N rows each.
    ///   - rows: The rows that the model takes in one call: more are cut into several calls, and the last is padded.
    ///   - step: The model.
    ///   - progress: Told after every call.
    /// - Returns: The latents after the last call, shaped like the noise.
    public func run(
        noise: Tensor<Float>,
        stepNoise: [Tensor<Float>],
        conditions: [String: Value],
        rows: Size,
        step: Step,
        progress: (@Sendable (Progress) -> Void)?
    ) async throws -> Tensor<Float> {
        let pictures = noise.shape.first ?? 0
        guard pictures > 0 else { throw ModelError.sampler(problem: "the noise has no rows: its shape is \(noise.shape)") }
        let wanted = calls.filter { $0.noise != 0 }.count
        guard stepNoise.count == wanted, stepNoise.allSatisfy({ $0.shape == noise.shape }) else {
            throw ModelError.sampler(problem: "got \(stepNoise.count) tensors of step noise, expected \(wanted) of shape \(noise.shape)")
        }
        let full = try doubled(conditions, pictures: pictures)
        var pending = stepNoise.makeIterator()
        var base = noise.scalars.map { start * $0 }
        var x = base
        var before: [Float] = []
        for (index, call) in calls.enumerated() {
            try Task.checkCancellation()
            let out = try await answer(x, like: noise, time: call.time, conditions: full, rows: rows, step: step)
            let drawn = call.noise == 0 ? nil : pending.next()?.scalars
            for i in x.indices {
                let slope = call.previous == 0 ? out[i] : out[i] + call.previous * before[i]
                x[i] = call.keep * base[i] + call.change * slope
                if let drawn { x[i] += call.noise * drawn[i] }
            }
            before = out
            if call.advances { base = x }
            progress?(Progress(completed: index + 1, total: calls.count))
        }
        return try Tensor(shape: noise.shape, scalars: x)
    }

    /// The conditions of the pictures, then of as many null rows.
    private func doubled(_ conditions: [String: Value], pictures: Int) throws -> [String: Value] {
        for (name, value) in conditions where value.shape.first != pictures {
            throw ModelError.wrongShape(name: name, got: value.shape, expected: "\(pictures) rows, one for each picture")
        }
        guard guidance > 1 else { return conditions }
        var full: [String: Value] = [:]
        for (name, value) in conditions {
            guard let row = null.first(where: { $0.name == name }) else { throw ModelError.missing(name: "the null row of \(name)") }
            full[name] = try value.appending(row.value().map(RepeatRow(count: pictures)), name: name)
        }
        return full
    }

    /// The model's answer at x, guided.
    private func answer(
        _ x: [Float], like noise: Tensor<Float>, time now: Float, conditions: [String: Value], rows: Size, step: Step
    ) async throws -> [Float] {
        let guided = guidance > 1
        let latents = try Tensor(shape: noise.shape, scalars: x)
        var inputs = conditions
        let both = guided ? latents.appending(latents) : latents
        inputs[latent] = .float32(both)
        inputs[time] = .float32(Tensor(repeating: now, shape: [both.shape[0]]))
        let out = try await batched(inputs, count: both.shape[0], rows: rows, step: step)
        guard out.shape == both.shape else {
            throw ModelError.wrongShape(name: output, got: out.shape, expected: "\(both.shape), the shape of the latents")
        }
        guard guided else { return out.scalars }
        let half = x.count
        return (0..<half).map { i in
            let null = out.scalars[half + i]
            return null + guidance * (out.scalars[i] - null)
        }
    }

    /// One call of the model on all rows, in as many calls as it takes.
    private func batched(_ inputs: [String: Value], count: Int, rows: Size, step: Step) async throws -> Tensor<Float> {
        var collected: Tensor<Float>?
        var start = 0
        while start < count {
            try Task.checkCancellation()
            let size = rows.fitting(count - start)
            let end = min(start + size, count)
            let part = inputs.mapValues { $0.map(TakeRows(range: start..<end, count: size)) }
            guard case .float32(let answer)? = try await step(part)[output], answer.shape.first == size else {
                throw ModelError.missing(name: "\(output) with \(size) rows")
            }
            let kept = answer.first(end - start)
            collected = collected.map { $0.appending(kept) } ?? kept
            start = end
        }
        guard let collected else { throw ModelError.sampler(problem: "there are no rows") }
        return collected
    }
}

/// One row (1, …) of the null condition.
public struct NullRow: Sendable, Codable {
    public let name: String
    public let type: ScalarType
    public let shape: [Int]
    /// Exact in double precision, whatever the type.
    public let values: [Double]

    func value() throws -> Value {
        switch type {
        case .float32: .float32(try Tensor(shape: shape, scalars: values.map(Float.init)))
        case .int32: .int32(try Tensor(shape: shape, scalars: try values.map(exact)))
        case .bool: .bool(try Tensor(shape: shape, scalars: values.map { $0 != 0 }))
        }
    }

    private func exact(_ value: Double) throws -> Int32 {
        guard let integer = Int32(exactly: value) else { throw ModelError.sampler(problem: "the null row of \(name) holds \(value)") }
        return integer
    }
}
