@preconcurrency import CoreML

@available(iOS 18, macOS 15, tvOS 18, visionOS 2, *)
extension Model {
    /// What the model keeps from one prediction to the next: one buffer for each of `description.states`.
    ///
    /// It belongs to the model that made it, and nobody else reads or writes it: predictions with it run one after the other.
    public final class State: @unchecked Sendable {
        // Only `owner`, which is an actor, uses them, and never across a suspension.
        fileprivate let buffers: [MLState]
        fileprivate let owner: Model

        fileprivate init(_ buffers: [MLState], owner: Model) {
            self.buffers = buffers
            self.owner = owner
        }
    }

    /// A new state, all zeros.
    /// - Throws: `ModelError.state` for a model that keeps none.
    public func makeState() throws -> State {
        guard !description.states.isEmpty else { throw ModelError.state(problem: "\(description.model) keeps no state") }
        return State(parts.map { $0.makeState() }, owner: self)
    }

    /// Runs the model once, and leaves in `state` what the next prediction starts from.
    public func predict(_ inputs: Inputs, using state: State) throws -> Outputs {
        try Outputs(named: predict(named: inputs.named, using: state))
    }

    /// The same with values by their names in the package.
    public func predict(named values: [String: Value], using state: State) throws -> [String: Value] {
        let buffers = try checkedBuffers(of: state)
        try description.check(values)
        var features: [String: MLFeatureValue] = [:]
        for (part, buffer) in zip(parts, buffers) {
            try Task.checkCancellation()
            let provider = try Self.provider(for: part, values: values, features: features)
            // The method that is not async: predictions of one state must not overlap, and nothing else of this actor can run meanwhile.
            Self.collect(try part.prediction(from: provider, using: buffer), into: &features)
        }
        return try Self.outputs(description.outputs, from: features)
    }

    /// Sets one of the buffers, for a model that does not start from zeros.
    public func write(_ value: Value, to name: String, of state: State) throws {
        let buffers = try checkedBuffers(of: state)
        guard let feature = description.states.first(where: { $0.name == name }) else { throw ModelError.missing(name: name) }
        try feature.check(value)
        for (part, buffer) in zip(parts, buffers) where part.modelDescription.stateDescriptionsByName[name] != nil {
            try buffer.withMultiArray(for: name) { try value.write(to: $0, name: name) }
            return
        }
        throw ModelError.missing(name: name)
    }

    /// One of the buffers as it is now.
    public func read(_ name: String, of state: State) throws -> Value {
        let buffers = try checkedBuffers(of: state)
        guard let feature = description.states.first(where: { $0.name == name }) else { throw ModelError.missing(name: name) }
        for (part, buffer) in zip(parts, buffers) where part.modelDescription.stateDescriptionsByName[name] != nil {
            return try buffer.withMultiArray(for: name) { try Value($0, as: feature) }
        }
        throw ModelError.missing(name: name)
    }

    private func checkedBuffers(of state: State) throws -> [MLState] {
        guard state.owner === self else {
            throw ModelError.state(problem: "the state was made by another model: take one of this one's makeState()")
        }
        return state.buffers
    }
}
