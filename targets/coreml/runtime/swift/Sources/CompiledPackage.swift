@preconcurrency import CoreML
import Foundation

/// One of the packages among this package's resources, and its compiled form, which is made on the device and kept.
struct CompiledPackage {
    /// The `.mlpackage`, or the `.mlmodelc` that Xcode made of it.
    let source: URL
    /// Where the compiled form is kept: caches that the system may clear, so that it is made again then.
    let kept: URL

    init(name: String, digest: String) throws {
        let stem = (name as NSString).deletingPathExtension
        guard let found = Bundle.module.url(forResource: stem, withExtension: "mlmodelc")
            ?? Bundle.module.url(forResource: stem, withExtension: "mlpackage")
        else {
            throw ModelError.resource(name: name, problem: "not found in \(Bundle.module.bundlePath)")
        }
        source = found
        let caches = try FileManager.default.url(for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
        // What another version of the system compiled may not load.
        let version = ProcessInfo.processInfo.operatingSystemVersion
        let system = "\(version.majorVersion).\(version.minorVersion).\(version.patchVersion)"
        kept = caches.appendingPathComponent("isthmus", isDirectory: true)
            .appendingPathComponent("\(digest)-\(system)", isDirectory: true)
            .appendingPathComponent("\(stem).mlmodelc", isDirectory: true)
    }

    func load(_ configuration: MLModelConfiguration) async throws -> MLModel {
        if source.pathExtension == "mlmodelc" {
            return try await MLModel.load(contentsOf: source, configuration: configuration)
        }
        // What is kept may be damaged: it is made again once, and what is wrong with that is the caller's to see.
        if FileManager.default.fileExists(atPath: kept.path),
            let model = try? await MLModel.load(contentsOf: kept, configuration: configuration)
        {
            return model
        }
        try await compile()
        return try await MLModel.load(contentsOf: kept, configuration: configuration)
    }

    private func compile() async throws {
        try Task.checkCancellation()
        let made = try await MLModel.compileModel(at: source)
        defer { try? FileManager.default.removeItem(at: made) }
        try FileManager.default.createDirectory(at: kept.deletingLastPathComponent(), withIntermediateDirectories: true)
        if FileManager.default.fileExists(atPath: kept.path) {
            _ = try FileManager.default.replaceItemAt(kept, withItemAt: made)
            return
        }
        do {
            try FileManager.default.moveItem(at: made, to: kept)
        } catch CocoaError.fileWriteFileExists {
            // Another process has compiled the same package meanwhile.
        }
    }
}
