//! Instances under a real engine: after a restore an instance equals the snapshot in each byte and
//! each global, whatever was done to it before and however it is restored.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use proptest::prelude::*;
use proptest::test_runner::{Config as Cases, TestRunner};
use stillframe::lazy::Fill;
use stillframe::track::{TrackMethod, Tracking};
use stillframe::{CaptureOptions, SnapshotId};
use stillframe_wasmtime::{Error, Guest, Template, engine, prepare};
use wasmtime::{Config, Engine, Instance, Linker, Module, Store, StoreLimits, StoreLimitsBuilder, Val};

const PAGE: usize = 64 << 10;

/// A module with active data segments, a start function that writes more and grows the memory,
/// hidden globals of every kind, and functions that change all of these.
const STATEFUL: &str = r#"(module
    (import "host" "started" (func $started))
    (memory 2 64)
    (global $calls (mut i32) (i32.const 0))
    (global $long (mut i64) (i64.const -5))
    (global $single (mut f32) (f32.const 1.5))
    (global $double (mut f64) (f64.const 2.5))
    (global $vector (mut v128) (v128.const i64x2 1 2))
    (global $constant i32 (i32.const 9))
    (data (i32.const 100) "written at instantiation")
    (data (i32.const 70000) "on the second page")
    (func $start
        (i32.store (i32.const 200) (i32.const 0x57A27))
        (drop (memory.grow (i32.const 1)))
        (i32.store (i32.const 131080) (i32.const 7))
        (call $started))
    (start $start)
    (func (export "write") (param $at i32) (param $value i32)
        (i32.store (local.get $at) (local.get $value))
        (global.set $calls (i32.add (global.get $calls) (i32.const 1)))
        (global.set $long (i64.add (global.get $long) (i64.extend_i32_s (local.get $value))))
        (global.set $single (f32.add (global.get $single) (f32.const 0.5)))
        (global.set $double (f64.mul (global.get $double) (f64.const -1.25)))
        (global.set $vector (v128.not (global.get $vector))))
    (func (export "fill") (param $at i32) (param $byte i32) (param $length i32)
        (memory.fill (local.get $at) (local.get $byte) (local.get $length)))
    (func (export "grow") (param $pages i32) (result i32) (memory.grow (local.get $pages)))
    (func (export "size") (result i32) (memory.size))
    (func (export "read") (param $at i32) (result i32) (i32.load (local.get $at))))"#;

struct World {
    _dir: tempfile::TempDir,
    vault: stillframe::Store,
    engine: Engine,
    module: Module,
}

impl World {
    fn new(text: &str) -> World {
        World::with(text, Config::new())
    }

    fn with(text: &str, config: Config) -> World {
        let dir = tempfile::tempdir().unwrap();
        let vault = stillframe::Store::options().create(dir.path().join("vault")).unwrap();
        let engine = engine(config).unwrap();
        let module = compile(&engine, text);
        World { _dir: dir, vault, engine, module }
    }

    fn subject(&self) -> Subject {
        Subject::of(&self.engine, &self.module)
    }

    fn capture(&self, subject: &mut Subject) -> stillframe::CaptureStats {
        let process = self.vault.process("p");
        subject.guest.capture(&mut subject.store, &process, &CaptureOptions::default()).unwrap()
    }
}

fn compile(engine: &Engine, text: &str) -> Module {
    Module::new(engine, prepare(&wat::parse_str(text).unwrap()).unwrap().wasm).unwrap()
}

#[derive(Default)]
struct Host {
    started: u32,
    limits: StoreLimits,
}

struct Subject {
    store: Store<Host>,
    instance: Instance,
    guest: Guest,
}

/// All observable state of an instance.
#[derive(Clone, PartialEq)]
struct Seen {
    memory: Vec<u8>,
    globals: Vec<String>,
}

impl Subject {
    fn of(engine: &Engine, module: &Module) -> Subject {
        let mut store = Store::new(engine, Host::default());
        store.limiter(|host| &mut host.limits);
        let mut linker = Linker::new(engine);
        linker
            .func_wrap("host", "started", |mut caller: wasmtime::Caller<'_, Host>| {
                caller.data_mut().started += 1
            })
            .unwrap();
        let instance = linker.instantiate(&mut store, module).unwrap();
        let guest = Guest::new(&mut store, instance).unwrap();
        Subject { store, instance, guest }
    }

    fn call<P: wasmtime::WasmParams, R: wasmtime::WasmResults>(&mut self, name: &str, parameters: P) -> R {
        self.try_call(name, parameters).unwrap()
    }

    fn try_call<P: wasmtime::WasmParams, R: wasmtime::WasmResults>(
        &mut self,
        name: &str,
        parameters: P,
    ) -> wasmtime::Result<R> {
        self.instance.get_typed_func::<P, R>(&mut self.store, name)?.call(&mut self.store, parameters)
    }

    fn write(&mut self, at: usize, value: i32) {
        self.call("write", (i32::try_from(at).unwrap(), value))
    }

    fn seen(&mut self) -> Seen {
        let memory = self.guest.memory().data(&self.store).to_vec();
        let exports: Vec<_> =
            self.instance.exports(&mut self.store).map(|export| export.into_extern()).collect();
        let globals = exports.into_iter().filter_map(|export| export.into_global());
        let globals: Vec<_> = globals.collect();
        let globals = globals.iter().map(|global| match global.get(&mut self.store) {
            Val::V128(vector) => format!("{:x}", vector.as_u128()),
            value => format!("{value:?}"),
        });
        Seen { memory, globals: globals.collect() }
    }
}

/// Each way to turn a snapshot back into an instance.
const WAYS: [&str; 5] =
    ["restored", "restored lazily", "of a template", "rolled back", "rolled back as a template"];

fn become_by(way: &str, world: &World, subject: &mut Subject, id: SnapshotId) {
    let Subject { store, guest, .. } = subject;
    match way {
        "restored" => guest.restore(store, &world.vault, id).unwrap(),
        "restored lazily" => drop(guest.restore_lazily(store, &world.vault, id, Fill::OnFault).unwrap()),
        "of a template" => {
            guest.instantiate(store, &Template::new(&world.vault, id).unwrap()).unwrap();
        }
        "rolled back" => drop(guest.rollback(store, &world.vault, id).unwrap()),
        _ => {
            // Of another snapshot, if there is one.
            let other = world.vault.process("p").snapshots()[0].id();
            guest.instantiate(store, &Template::new(&world.vault, other).unwrap()).unwrap();
            drop(guest.rollback(store, &world.vault, id).unwrap());
        }
    }
}

#[test]
fn a_snapshot_becomes_an_instance_byte_by_byte_whatever_segments_and_the_start_function_have_written() {
    let world = World::new(STATEFUL);
    let mut subject = world.subject();
    assert_eq!(subject.store.data().started, 1);
    // The bytes that instantiation wrote are overwritten in the snapshot.
    for at in [100, 104, 200, 70_000, 131_080] {
        subject.write(at, 0x0101_0101);
    }
    let id = world.capture(&mut subject).id;
    let expected = subject.seen();
    assert_eq!(expected.memory.len(), 3 * PAGE);
    assert_eq!(expected.globals.len(), 5);
    for way in WAYS {
        let mut other = world.subject();
        other.call::<_, ()>("fill", (0, 0xEE, 1000));
        other.write(90_000, 5);
        assert!(other.seen() != expected);
        become_by(way, &world, &mut other, id);
        assert!(other.seen() == expected, "{way}");
        // The restored instance continues as the first one does.
        let mut first = world.subject();
        become_by("restored", &world, &mut first, id);
        for subject in [&mut first, &mut other] {
            subject.write(50_000, 77);
            assert_eq!(subject.call::<i32, i32>("grow", 2), 3);
            subject.write(5 * PAGE - 4, 78);
        }
        assert!(other.seen() == first.seen(), "{way}");
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize, i32),
    Fill(usize, u8, usize),
    Grow(u8),
    Capture,
    Become(usize, usize),
    Fresh,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let at = 0..6 * PAGE;
    let step = prop_oneof![
        5 => (at.clone(), any::<i32>()).prop_map(|(at, value)| Step::Write(at, value)),
        2 => (at, any::<u8>(), 1..2 * PAGE).prop_map(|(at, byte, length)| Step::Fill(at, byte, length)),
        1 => (0u8..3).prop_map(Step::Grow),
        4 => Just(Step::Capture),
        5 => (0..WAYS.len(), 0usize..9).prop_map(|(way, nth)| Step::Become(way, nth)),
        1 => Just(Step::Fresh),
    ];
    prop::collection::vec(step, 1..30)
}

/// Run more cases with `STILLFRAME_WASMTIME_CASES`.
#[test]
fn an_instance_that_goes_to_and_fro_between_its_snapshots_is_always_what_it_was() {
    let cases = std::env::var("STILLFRAME_WASMTIME_CASES").map_or(24, |cases| cases.parse().unwrap());
    let mut runner = TestRunner::new(Cases { cases, failure_persistence: None, ..Cases::default() });
    let engine = engine(Config::new()).unwrap();
    let module = compile(&engine, STATEFUL);
    let run = |steps: Vec<Step>| {
        let dir = tempfile::tempdir().unwrap();
        let vault = stillframe::Store::options().create(dir.path().join("vault")).unwrap();
        let world = World { _dir: dir, vault, engine: engine.clone(), module: module.clone() };
        let mut subject = world.subject();
        let mut moments: Vec<(SnapshotId, Seen)> = Vec::new();
        for step in steps {
            let length = subject.guest.memory().data_size(&subject.store);
            match step {
                Step::Write(at, value) => subject.write(at.min(length - 4), value),
                Step::Fill(at, byte, bytes) => {
                    let at = at.min(length);
                    let bytes = i32::try_from(bytes.min(length - at)).unwrap();
                    subject.call::<_, ()>("fill", (i32::try_from(at).unwrap(), i32::from(byte), bytes));
                }
                Step::Grow(pages) => {
                    subject.call::<i32, i32>("grow", i32::from(pages));
                }
                Step::Capture => {
                    let id = world.capture(&mut subject).id;
                    moments.push((id, subject.seen()));
                }
                Step::Become(way, nth) if !moments.is_empty() => {
                    let (id, expected) = &moments[nth % moments.len()];
                    become_by(WAYS[way], &world, &mut subject, *id);
                    assert!(subject.seen() == *expected, "{}", WAYS[way]);
                }
                Step::Become(..) => {}
                Step::Fresh => subject = world.subject(),
            }
        }
        // The stored image is what was captured, whichever dirty tracking was used.
        for (id, expected) in moments {
            let image = world.vault.restore(id).unwrap().into_mapping().unwrap();
            assert!(image[..] == expected.memory[..], "{id}");
        }
        Ok(())
    };
    runner.run(&steps(), run).unwrap();
}

#[test]
fn a_capture_costs_what_was_written_and_a_rollback_what_differs() {
    let world = World::new(STATEFUL);
    let mut subject = world.subject();
    let first = world.capture(&mut subject);
    subject.write(150_000, 1);
    let second = world.capture(&mut subject);
    assert_eq!((second.parent, second.changed_regions), (Some(first.id), 1));
    let Tracking::By(means) = second.tracking else {
        return eprintln!("not tested as tracked: {}", second.tracking);
    };
    assert_eq!(means, TrackMethod::WriteProtection);

    // Pages that the memory grows by are tracked too.
    assert_eq!(subject.call::<i32, i32>("grow", 1), 3);
    subject.write(3 * PAGE + 20_000, 2);
    let third = world.capture(&mut subject);
    assert_eq!((third.changed_regions, &third.tracking), (1, &Tracking::By(TrackMethod::WriteProtection)));

    let stats = subject.guest.rollback(&mut subject.store, &world.vault, first.id).unwrap();
    assert_eq!((stats.written_regions, subject.call::<(), i32>("size", ())), (1, 3));
    assert_eq!(subject.guest.basis(), Some(first.id));

    // A branch.
    subject.write(9_000, 3);
    let branch = world.capture(&mut subject);
    assert_eq!(branch.parent, Some(first.id));

    // After a full restore the tracker knows from the start which snapshot the memory equals.
    let mut restored = world.subject();
    restored.guest.restore(&mut restored.store, &world.vault, second.id).unwrap();
    restored.write(9_000, 4);
    let taken = world.capture(&mut restored);
    assert_eq!((taken.parent, taken.changed_regions), (Some(second.id), 1));
    assert_eq!(taken.tracking, Tracking::By(TrackMethod::WriteProtection));

    // A copy of a template needs no write protection.
    let mut copy = world.subject();
    copy.guest.instantiate(&mut copy.store, &Template::new(&world.vault, second.id).unwrap()).unwrap();
    copy.write(9_000, 4);
    let taken = world.capture(&mut copy);
    assert_eq!((taken.parent, taken.changed_regions), (Some(second.id), 1));
    assert_eq!(taken.tracking, Tracking::By(TrackMethod::CopyOnWrite));
}

#[test]
fn an_instance_goes_on_while_its_snapshot_becomes_durable() {
    let world = World::new(STATEFUL);
    let mut subject = world.subject();
    let mut expected = Vec::new();
    let pending: Vec<_> = (0..5)
        .map(|nth| {
            subject.write(150_000 + nth * 4, 7);
            expected.push(subject.seen());
            let Subject { store, guest, .. } = &mut subject;
            guest.start_capture(store, &world.vault.process("p"), &CaptureOptions::default()).unwrap()
        })
        .collect();
    subject.call::<_, ()>("fill", (0, 0xEE, 3 * 65536));
    for (pending, expected) in pending.into_iter().zip(expected) {
        let id = pending.wait().unwrap().id;
        subject.guest.rollback(&mut subject.store, &world.vault, id).unwrap();
        assert!(subject.seen() == expected);
    }
}

#[test]
fn a_memory_that_shrank_cannot_be_touched_behind_its_end_and_grows_by_zeros() {
    for guard_bytes in [None, Some(0)] {
        let mut config = Config::new();
        guard_bytes.map(|bytes| config.memory_guard_size(bytes).memory_reservation(bytes));
        let world = World::with(STATEFUL, config);
        let mut subject = world.subject();
        let small = world.capture(&mut subject).id;
        assert_eq!(subject.call::<i32, i32>("grow", 4), 3);
        subject.write(6 * PAGE, 0x0BAD);
        let large = world.capture(&mut subject).id;
        subject.guest.rollback(&mut subject.store, &world.vault, small).unwrap();
        assert_eq!(subject.call::<(), i32>("size", ()), 3);
        let at = i32::try_from(6 * PAGE).unwrap();
        assert!(subject.try_call::<i32, i32>("read", at).unwrap_err().to_string().contains("wasm"));
        assert_eq!(subject.guest.memory().data(&subject.store).len(), 3 * PAGE);
        assert_eq!(subject.call::<i32, i32>("grow", 4), 3);
        assert_eq!(subject.call::<i32, i32>("read", at), 0);
        subject.guest.rollback(&mut subject.store, &world.vault, large).unwrap();
        assert_eq!(subject.call::<i32, i32>("read", at), 0x0BAD);
    }
}

#[test]
fn many_instances_of_one_template_live_side_by_side_and_their_template_may_be_forgotten() {
    let world = World::new(STATEFUL);
    let mut subject = world.subject();
    subject.write(150_000, 1);
    let id = world.capture(&mut subject).id;
    let expected = subject.seen();
    let template = Template::new(&world.vault, id).unwrap();
    world.vault.forget(&[id]).unwrap();
    let mut copies: Vec<Subject> = (0..20).map(|_| world.subject()).collect();
    for (number, copy) in copies.iter_mut().enumerate() {
        copy.guest.instantiate(&mut copy.store, &template).unwrap();
        copy.write(4 * number, 7);
    }
    drop(template);
    for (number, copy) in copies.iter_mut().enumerate() {
        let mut expected = expected.memory.clone();
        expected[4 * number..][..4].copy_from_slice(&7i32.to_le_bytes());
        assert!(copy.seen().memory == expected, "{number}");
        // Its parent is gone, so the capture reads everything.
        assert_eq!(world.capture(copy).parent.is_none(), number == 0);
    }
}

#[test]
fn several_instances_in_one_store_and_memories_of_64_bits_are_no_trouble() {
    let world = World::new(
        r#"(module (memory i64 1) (func (export "write") (param i64 i32) (i32.store (local.get 0) (local.get 1)))
            (func (export "grow") (param i64) (result i64) (memory.grow (local.get 0))))"#,
    );
    let mut store = Store::new(&world.engine, ());
    let process = world.vault.process("p");
    let mut guests = Vec::new();
    for number in 0..3 {
        let instance = Instance::new(&mut store, &world.module, &[]).unwrap();
        let mut guest = Guest::new(&mut store, instance).unwrap();
        instance
            .get_typed_func::<(i64, i32), ()>(&mut store, "write")
            .unwrap()
            .call(&mut store, (8, number))
            .unwrap();
        let grow = instance.get_typed_func::<i64, i64>(&mut store, "grow").unwrap();
        assert_eq!(grow.call(&mut store, number.into()).unwrap(), 1);
        // More than is reserved for the memory.
        assert_eq!(grow.call(&mut store, 70_000).unwrap(), -1);
        let id = guest.capture(&mut store, &process, &CaptureOptions::default()).unwrap().id;
        guests.push((guest, id));
    }
    let ids: Vec<_> = guests.iter().map(|(_, id)| *id).collect();
    for (nth, (guest, _)) in guests.iter_mut().enumerate() {
        guest.rollback(&mut store, &world.vault, ids[(nth + 1) % 3]).unwrap();
        let memory = guest.memory().data(&store);
        assert_eq!((usize::from(memory[8]), memory.len()), ((nth + 1) % 3, ((nth + 1) % 3 + 1) * PAGE));
    }
}

// ---- Refusals ---------------------------------------------------------------------------------

fn guest_of(engine: &Engine, wasm: &[u8]) -> Result<Guest, Error> {
    let module = Module::new(engine, wasm).unwrap();
    let mut store = Store::new(engine, ());
    let instance = Instance::new(&mut store, &module, &[]).unwrap();
    Guest::new(&mut store, instance)
}

#[test]
fn what_was_not_set_up_is_told_with_how_to_mend_it() {
    let wasm = wat::parse_str("(module (memory 1))").unwrap();
    let prepared = prepare(&wasm).unwrap().wasm;
    let ours = engine(Config::new()).unwrap();
    let error = guest_of(&ours, &wasm).unwrap_err();
    assert!(matches!(error, Error::NotPrepared), "{error}");
    let mut config = Config::new();
    let theirs = Engine::new(config.memory_init_cow(false)).unwrap();
    let error = guest_of(&theirs, &prepared).unwrap_err();
    assert!(matches!(error, Error::Engine { .. }) && error.to_string().contains("configure"), "{error}");
    let error = guest_of(&Engine::default(), &prepared).unwrap_err();
    assert!(error.to_string().contains("copy-on-write"), "{error}");
    guest_of(&ours, &prepared).unwrap();
}

#[test]
fn a_snapshot_of_something_else_is_refused_and_nothing_changes() {
    let world = World::new(STATEFUL);
    let mut subject = world.subject();
    let other = World::new("(module (memory 3))");
    let module = compile(&world.engine, "(module (memory 3))");
    let mut store = Store::new(&world.engine, ());
    let instance = Instance::new(&mut store, &module, &[]).unwrap();
    let mut theirs = Guest::new(&mut store, instance).unwrap();
    let process = world.vault.process("other");
    let of_another_module = theirs.capture(&mut store, &process, &CaptureOptions::default()).unwrap().id;
    let of_bytes = process.capture(&[7; 3 * PAGE], &CaptureOptions::default()).unwrap().id;
    drop(other);

    let before = subject.seen();
    let Subject { store, guest, .. } = &mut subject;
    for (id, said) in
        [(of_another_module, "is of the module"), (of_bytes, "is not of a WebAssembly instance")]
    {
        for error in [
            guest.restore(store, &world.vault, id).unwrap_err(),
            guest.restore_lazily(store, &world.vault, id, Fill::OnFault).unwrap_err(),
            guest.rollback(store, &world.vault, id).unwrap_err(),
        ] {
            assert!(error.to_string().contains(said), "{error}");
        }
    }
    assert!(subject.seen() == before);
    world.capture(&mut subject);
}

#[test]
fn a_table_that_grew_is_noticed_as_its_elements_are_not_captured() {
    let text = r#"(module (memory 1) (table 2 funcref) (func $f) (elem declare func $f)
        (func (export "grow") (drop (table.grow (ref.func $f) (i32.const 1)))))"#;
    let prepared = prepare(&wat::parse_str(text).unwrap()).unwrap();
    let left_out: Vec<String> = prepared.left_out.iter().map(ToString::to_string).collect();
    assert_eq!(left_out, ["the elements of tables, which the code changes (table.grow)"]);
    let world = World::new(text);
    let mut subject = world.subject();
    let before = world.capture(&mut subject).id;
    subject.call::<(), ()>("grow", ());
    let after = world.capture(&mut subject).id;
    subject.guest.rollback(&mut subject.store, &world.vault, after).unwrap();
    let error = subject.guest.rollback(&mut subject.store, &world.vault, before).unwrap_err();
    assert!(matches!(error, Error::Table { index: 0, expected: 2, found: 3 }), "{error}");
    let mut fresh = world.subject();
    assert!(fresh.guest.restore(&mut fresh.store, &world.vault, after).is_err());
    fresh.guest.restore(&mut fresh.store, &world.vault, before).unwrap();
}

#[test]
fn a_memory_that_may_not_grow_so_far_is_refused_and_nothing_changes() {
    let world = World::new(STATEFUL);
    let mut subject = world.subject();
    subject.call::<i32, i32>("grow", 10);
    let large = world.capture(&mut subject).id;
    let template = Template::new(&world.vault, large).unwrap();
    let mut limited = world.subject();
    limited.store.data_mut().limits = StoreLimitsBuilder::new().memory_size(5 * PAGE).build();
    let before = limited.seen();
    let Subject { store, guest, .. } = &mut limited;
    for error in [
        guest.restore(store, &world.vault, large).unwrap_err(),
        guest.rollback(store, &world.vault, large).unwrap_err(),
        guest.instantiate(store, &template).unwrap_err(),
    ] {
        assert!(
            matches!(error, Error::CannotGrow { wanted_bytes, .. } if wanted_bytes == 13 << 16),
            "{error}"
        );
    }
    assert!(limited.seen() == before);
}

#[test]
fn damage_leaves_an_instance_as_it_was_or_without_memory_until_another_snapshot_is_restored() {
    let world = World::new(STATEFUL);
    let mut subject = world.subject();
    let sound = world.capture(&mut subject).id;
    subject.call::<i32, i32>("grow", 3);
    for at in (0..2 * PAGE).step_by(4) {
        let noise = u32::try_from(at).unwrap().wrapping_mul(2_654_435_761).rotate_left(7) ^ 0x5851_F42D;
        subject.guest.memory().write(&mut subject.store, 4 * PAGE + at, &noise.to_le_bytes()).unwrap();
    }
    let damaged = world.capture(&mut subject).id;
    let stored = subject.guest.memory().data(&subject.store)[5 * PAGE..][..64].to_vec();
    let pack = world._dir.path().join("vault/packs/00000001.pack");
    let mut bytes = std::fs::read(&pack).unwrap();
    let at = bytes.windows(64).position(|window| window == &stored[..]).expect("the bytes are in the pack");
    bytes[at] ^= 1;
    std::fs::write(&pack, bytes).unwrap();

    let mut other = world.subject();
    other.write(90_000, 5);
    let before = other.seen();
    let Subject { store, guest, .. } = &mut other;
    guest.rollback(store, &world.vault, damaged).unwrap_err();
    assert!(other.seen() == before);
    let Subject { store, guest, instance, .. } = &mut other;
    guest.restore(store, &world.vault, damaged).unwrap_err();
    let process = world.vault.process("p");
    let refused = guest.capture(store, &process, &CaptureOptions::default()).unwrap_err();
    assert!(matches!(refused, Error::Broken), "{refused}");
    let mut again = Guest::new(store, *instance).unwrap();
    assert!(matches!(again.capture(store, &process, &CaptureOptions::default()), Err(Error::Broken)));
    assert!(matches!(guest.rollback(store, &world.vault, sound), Err(Error::Broken)));
    guest.restore(store, &world.vault, sound).unwrap();
    other.write(90_000, 5);
    assert!(Template::new(&world.vault, damaged).is_err());
}
