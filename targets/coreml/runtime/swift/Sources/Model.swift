@preconcurrency import CoreML
import Foundation

/// The model: loaded once, called with typed inputs, from any task.
///
/// `Inputs` and `Outputs` are in Interface.swift, which is written from the bundle's manifest.
public actor Model {
    /// What the model takes and gives.
    public nonisolated let description: Description
    /// Where Core ML may run it.
    public nonisolated let computeUnits: MLComputeUnits
    /// One for each package, in the order in which they are run; of the default function, where there are several.
    let parts: [MLModel]
    /// The other functions that have been called.
    private var others: [String: [MLModel]] = [:]

    private init(description: Description, computeUnits: MLComputeUnits, loaded: Loaded) {
        self.description = description
        self.computeUnits = computeUnits
        parts = loaded.parts
    }

    /// Loads the model from this package's resources. The first time on a device its packages are compiled there, which takes a while.
    ///
    /// - Parameter computeUnits: Where Core ML may run it; by default what was chosen when it was exported.
    /// - Throws: `ModelError.resource`, `CancellationError`, or what Core ML refuses the package with.
    public static func load(computeUnits: MLComputeUnits? = nil) async throws -> Model {
        let description = try Description.load()
        let units = computeUnits ?? description.units
        let loaded = try await Loaded(description, function: description.functions?.first?.name, units: units)
        return Model(description: description, computeUnits: units, loaded: loaded)
    }

    /// The packages for these inputs. A function is loaded when it is called first.
    private func packages(for values: [String: Value]) async throws -> [MLModel] {
        guard let name = try description.function(for: values), name != description.functions?.first?.name else { return parts }
        if let found = others[name] { return found }
        let loaded = try await Loaded(description, function: name, units: computeUnits)
        others[name] = loaded.parts
        return loaded.parts
    }

    /// Runs the model once.
    ///
    /// - Throws: `ModelError` for inputs that it does not take, `CancellationError`, or Core ML's own error.
    public func predict(_ inputs: Inputs) async throws -> Outputs {
        try Outputs(named: await predict(named: inputs.named))
    }

    /// The same with values by their names in the package.
    public func predict(named values: [String: Value]) async throws -> [String: Value] {
        guard description.states.isEmpty else {
            throw ModelError.state(problem: "\(description.model) keeps a state: call it with one of makeState()")
        }
        try description.check(values)
        var features: [String: MLFeatureValue] = [:]
        for part in try await packages(for: values) {
            try Task.checkCancellation()
            let provider = try Self.provider(for: part, values: values, features: features)
            let answer: any MLFeatureProvider
            if #available(iOS 17, macOS 14, tvOS 17, visionOS 1, *) {
                answer = try await part.prediction(from: provider, options: MLPredictionOptions())
            } else {
                answer = try Self.predictNow(part, provider)
            }
            Self.collect(answer, into: &features)
        }
        return try Self.outputs(description.outputs, from: features)
    }

    /// What one package reads: the call's values, and what the packages before it gave.
    static func provider(for part: MLModel, values: [String: Value], features: [String: MLFeatureValue]) throws -> MLDictionaryFeatureProvider {
        var given: [String: MLFeatureValue] = [:]
        for (name, wanted) in part.modelDescription.inputDescriptionsByName {
            if let feature = features[name] {
                given[name] = feature
            } else if let value = values[name] {
                given[name] = try value.feature(name: name, type: wanted.multiArrayConstraint?.dataType ?? .float32)
            } else {
                throw ModelError.missing(name: name)
            }
        }
        return try MLDictionaryFeatureProvider(dictionary: given)
    }

    static func collect(_ answer: any MLFeatureProvider, into features: inout [String: MLFeatureValue]) {
        for name in answer.featureNames {
            features[name] = answer.featureValue(for: name)
        }
    }

    static func outputs(_ wanted: [Feature], from features: [String: MLFeatureValue]) throws -> [String: Value] {
        var values: [String: Value] = [:]
        for feature in wanted {
            guard let array = features[feature.name]?.multiArrayValue else { throw ModelError.missing(name: feature.name) }
            let value = try Value(array, as: feature)
            try feature.check(value)
            values[feature.name] = value
        }
        return values
    }

    /// Not async, so that the method of the same name that is not is meant: the other one came with iOS 17.
    private static func predictNow(_ part: MLModel, _ provider: MLDictionaryFeatureProvider) throws -> any MLFeatureProvider {
        try part.prediction(from: provider)
    }
}

/// The packages of one function, as Core ML has loaded them: made outside of the actor, handed to it, and then used by it alone.
private struct Loaded: @unchecked Sendable {
    let parts: [MLModel]

    /// - Parameter function: Its name; nil for packages that have one.
    init(_ description: Description, function: String?, units: MLComputeUnits) async throws {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        if let function {
            guard #available(iOS 18, macOS 15, tvOS 18, visionOS 2, *) else {
                throw ModelError.resource(name: function, problem: "several functions in a package need iOS 18 or macOS 15")
            }
            configuration.functionName = function
        }
        var parts: [MLModel] = []
        for name in description.packages {
            try Task.checkCancellation()
            let package = try CompiledPackage(name: name, digest: description.digest)
            parts.append(try await package.load(configuration))
        }
        self.parts = parts
    }
}
