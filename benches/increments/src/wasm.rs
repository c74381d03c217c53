//! A WebAssembly program under Wasmtime: `store.wat`, a key-value store that handles one request in
//! each step.

use stillframe::source::Source;
use wasmtime::{Engine, Instance, Memory, Module, Store};

use crate::state::State;
use crate::workload::Workload;

const RECORDS: i32 = 110_000;
const OPERATIONS_PER_STEP: i32 = 250;
/// Requests before the first moment, so that the free lists are not empty.
const WARM_UP: usize = 20;

pub struct Wasm {
    store: Store<()>,
    instance: Instance,
    memory: Memory,
}

impl Wasm {
    pub fn new() -> Self {
        let engine = Engine::default();
        let module = Module::new(&engine, include_str!("store.wat")).expect("store.wat is a valid module");
        let mut store = Store::new(&engine, ());
        let instance = Instance::new(&mut store, &module, &[]).unwrap();
        let memory = instance.get_memory(&mut store, "memory").unwrap();
        let mut wasm = Wasm { store, instance, memory };
        wasm.call("fill", RECORDS);
        for _ in 0..WARM_UP {
            wasm.step();
        }
        wasm
    }

    fn call(&mut self, function: &str, argument: i32) {
        let function = self.instance.get_typed_func::<i32, ()>(&mut self.store, function).unwrap();
        function.call(&mut self.store, argument).expect("the program does not trap");
    }
}

impl Workload for Wasm {
    fn step(&mut self) {
        self.call("request", OPERATIONS_PER_STEP);
    }

    fn state(&self) -> State {
        State::of_bytes(self.memory.data(&self.store))
    }

    fn source(&self) -> Box<dyn Source + '_> {
        Box::new(self.memory.data(&self.store))
    }
}
