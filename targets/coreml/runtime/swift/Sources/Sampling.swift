import Foundation

extension Model {
    /// What a stream of `sampling` gives.
    public enum Sampling: Sendable {
        case progress(Sampler.Progress)
        /// The latents, the last element.
        case latents(Tensor<Float>)
    }

    /// Draws latents, one for each row of the conditions. Ends early with `CancellationError` when its task is cancelled.
    ///
    /// - Parameters:
    ///   - conditions: The model's inputs beside the latents and the time, N rows each.
    ///   - noise: Standard normal, N rows of the latents' shape.
    ///   - stepNoise: As much again for each call that adds some, in order; most samplers add none.
    ///   - progress: Told after every call of the sampler.
    /// - Returns: Latents shaped like the noise. For a model of pictures they are in [-1, 1], and not clipped: see `Picture`.
    public func sample(
        _ conditions: Conditions,
        noise: Tensor<Float>,
        stepNoise: [Tensor<Float>] = [],
        progress: (@Sendable (Sampler.Progress) -> Void)? = nil
    ) async throws -> Tensor<Float> {
        let (sampler, latent) = try samplerAndLatent()
        guard noise.shape.count == latent.sizes.count, zip(latent.sizes, noise.shape).dropFirst().allSatisfy({ $0.allows($1) }) else {
            throw ModelError.wrongShape(name: "the noise", got: noise.shape, expected: "rows of \(latent.shape)")
        }
        return try await sampler.run(
            noise: noise,
            stepNoise: stepNoise,
            conditions: conditions.named,
            rows: latent.sizes[0],
            step: { try await self.predict(named: $0) },
            progress: progress
        )
    }

    /// Draws latents from noise of this package's own, which is not numpy's: see `SeededNoise`.
    ///
    /// - Parameter count: N, the number of rows of the conditions.
    public func sample(
        _ conditions: Conditions, count: Int, seed: UInt64, progress: (@Sendable (Sampler.Progress) -> Void)? = nil
    ) async throws -> Tensor<Float> {
        let (sampler, latent) = try samplerAndLatent()
        guard count > 0 else { throw ModelError.sampler(problem: "\(count) pictures were asked for, expected at least 1") }
        var noise = SeededNoise(seed: seed)
        let shape = [count] + latent.sizes.dropFirst().map(\.least)
        let start = noise.tensor(shape: shape)
        let further = sampler.calls.filter { $0.noise != 0 }.map { _ in noise.tensor(shape: shape) }
        return try await sample(conditions, noise: start, stepNoise: further, progress: progress)
    }

    /// The same as a stream of the progress and then the latents. Who stops reading it cancels the sampler.
    public nonisolated func sampling(_ conditions: Conditions, count: Int, seed: UInt64) -> AsyncThrowingStream<Sampling, any Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    let latents = try await self.sample(conditions, count: count, seed: seed) { continuation.yield(.progress($0)) }
                    continuation.yield(.latents(latents))
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    private func samplerAndLatent() throws -> (Sampler, Feature) {
        guard let sampler = description.sampler else {
            throw ModelError.sampler(problem: "\(description.model) was exported without a sampler")
        }
        guard let latent = description.inputs.first(where: { $0.name == sampler.latent }), !latent.sizes.isEmpty else {
            throw ModelError.missing(name: sampler.latent)
        }
        return (sampler, latent)
    }
}

/// One picture of a tensor of them.
public struct Picture: Sendable, Equatable {
    public let width: Int
    public let height: Int
    /// 1 for grey, 3 for red, green and blue.
    public let channels: Int
    /// Rows from the top, pixels from the left, the channels of a pixel side by side.
    public let pixels: [UInt8]

    /// The pictures of latents (N, C, H, W) in [-1, 1], clipped, with C = 1 or 3.
    public static func all(of latents: Tensor<Float>) throws -> [Picture] {
        guard latents.shape.count == 4, [1, 3].contains(latents.shape[1]) else {
            throw ModelError.wrongShape(name: "the latents", got: latents.shape, expected: "[N, 1 or 3, height, width]")
        }
        let (channels, height, width) = (latents.shape[1], latents.shape[2], latents.shape[3])
        let plane = height * width
        return (0..<latents.shape[0]).map { picture in
            var pixels: [UInt8] = []
            pixels.reserveCapacity(plane * channels)
            for pixel in 0..<plane {
                for channel in 0..<channels {
                    let value = latents.scalars[(picture * channels + channel) * plane + pixel]
                    let clipped = value.isNaN ? 0 : min(max((value + 1) / 2, 0), 1)
                    pixels.append(UInt8((clipped * 255).rounded()))
                }
            }
            return Picture(width: width, height: height, channels: channels, pixels: pixels)
        }
    }

    /// A portable graymap or pixmap, which most programs read.
    public var netpbm: Data {
        Data("\(channels == 1 ? "P5" : "P6")\n\(width) \(height)\n255\n".utf8) + Data(pixels)
    }
}
