//! A guest: one instance whose state is captured, restored and rolled back between calls.

use stillframe::capture::PendingCapture;
use stillframe::lazy::{Fill, Filled, WorkingSet};
use stillframe::rollback::RollbackStats;
use stillframe::source::Attachment;
use stillframe::store::StoreError;
use stillframe::{CaptureOptions, CaptureStats, Hash, Process, Reservation, SnapshotId};
use wasmtime::{Extern, Global, Instance, Memory, Store, Table};

use crate::error::Error;
use crate::prepare::PREFIX;
use crate::state::{ATTACHMENT, Number, State};
use crate::sys::{self, Ours, Shared, lock};

/// An instance of a [prepared](crate::prepare) module, in a store of an [engine](crate::engine)
/// made for it.
///
/// All its methods take the store by `&mut Store`, which no code has while WebAssembly or a host
/// function runs. So an instance is always captured and restored between two calls. As in Wasmtime,
/// the methods panic if the store belongs to another instance, or if its limiter is asynchronous.
///
/// A snapshot holds the linear memory, every mutable global of a number type, and the sizes of
/// tables, which are compared. It does not hold elements of tables and other references
/// ([`Prepared::left_out`](crate::Prepared::left_out) says whether the module has such), the
/// store's data, fuel and limits, or anything that the host did for the guest.
///
/// From its first capture or restore on, the dirty memory of the instance is tracked where the
/// machine can: by write protection, or by copy-on-write for an instance of a template. So the cost
/// of a capture depends on what was written since the last one, and the cost of a rollback on what
/// differs.
#[derive(Debug)]
pub struct Guest {
    memory: Memory,
    shared: Shared,
    globals: Vec<(u32, Global)>,
    tables: Vec<(u32, Table)>,
    module: Hash,
}

/// A snapshot of a guest that is restored once; instances become copies of it in microseconds. See
/// [`Guest::instantiate`].
#[derive(Clone, Debug)]
pub struct Template {
    image: stillframe::Template,
    state: State,
}

impl Template {
    /// Restores a snapshot once. From then on the template does not need the snapshot store. Cost:
    /// that of a full restore, and as much memory as the snapshot's non-zero content.
    ///
    /// # Errors
    ///
    /// [`Error::NotAGuest`], [`Error::State`]; as [`stillframe::Store::template`].
    pub fn new(vault: &stillframe::Store, id: SnapshotId) -> Result<Template, Error> {
        Ok(Template { state: state_of(vault, id)?, image: vault.template(id)? })
    }

    /// The snapshot.
    pub fn snapshot(&self) -> SnapshotId {
        self.image.snapshot()
    }
}

impl Guest {
    /// Makes a guest of an instance.
    ///
    /// # Errors
    ///
    /// [`Error::NotPrepared`]; [`Error::Engine`] if the memory was not made by an engine of this
    /// crate.
    pub fn new<T: 'static>(wasm: &mut Store<T>, instance: Instance) -> Result<Guest, Error> {
        crate::check(wasm.engine())?;
        let (mut memory, mut globals, mut tables) = (None, Vec::new(), Vec::new());
        for export in instance.exports(&mut *wasm) {
            let Some(name) = export.name().strip_prefix(PREFIX) else { continue };
            let Some((what, number)) = name.split_once(':') else { continue };
            let (what, number) = (what.to_owned(), number.to_owned());
            match (what.as_str(), export.into_extern()) {
                ("memory", Extern::Memory(found)) => memory = Some((found, number)),
                ("global", Extern::Global(global)) => {
                    globals.extend(number.parse().map(|index| (index, global)))
                }
                ("table", Extern::Table(table)) => tables.extend(number.parse().map(|index| (index, table))),
                _ => {}
            }
        }
        let (memory, module) = memory.ok_or(Error::NotPrepared)?;
        let module = hash_of(&module).ok_or(Error::NotPrepared)?;
        let shared = sys::find(memory.data_ptr(&*wasm)).ok_or(Error::Engine {
            what: "has not had the instance's memory made by stillframe (another memory creator or allocator, or a \
                   memory that the host has made)",
        })?;
        Ok(Guest { memory, shared, globals, tables, module })
    }

    /// The linear memory.
    pub fn memory(&self) -> Memory {
        self.memory
    }

    /// The snapshot that the instance equals, except for writes that are tracked since: the parent
    /// of the next capture. `None` before the first one.
    pub fn basis(&self) -> Option<SnapshotId> {
        lock(&self.shared).memory.basis()
    }

    /// Takes a snapshot. Its parent, unless `options` name one, is the snapshot as which the
    /// instance was last captured, restored or rolled back: so history branches where the instance
    /// did.
    ///
    /// The cost depends on what was written since. It returns when the snapshot is durable;
    /// [`start_capture`](Self::start_capture) returns when the instance may continue.
    ///
    /// # Errors
    ///
    /// [`Error::Broken`]; as [`Process::capture`].
    pub fn capture<T>(
        &mut self,
        wasm: &mut Store<T>,
        process: &Process<'_>,
        options: &CaptureOptions,
    ) -> Result<CaptureStats, Error> {
        self.capture_by(wasm, options, |memory, options| process.capture(memory, options))
    }

    /// Takes a snapshot and returns as soon as the changed memory is copied: see
    /// [`Process::start_capture`].
    ///
    /// # Errors
    ///
    /// As [`capture`](Self::capture).
    pub fn start_capture<T>(
        &mut self,
        wasm: &mut Store<T>,
        process: &Process<'_>,
        options: &CaptureOptions,
    ) -> Result<PendingCapture, Error> {
        self.capture_by(wasm, options, |memory, options| process.start_capture(memory, options))
    }

    fn capture_by<T, R>(
        &mut self,
        wasm: &mut Store<T>,
        options: &CaptureOptions,
        capture: impl Fn(&Reservation, &CaptureOptions) -> Result<R, stillframe::Error>,
    ) -> Result<R, Error> {
        let state = self.state(wasm);
        let Ours { memory, is_broken } = &mut *lock(&self.shared);
        if *is_broken {
            return Err(Error::Broken);
        }
        memory.track_writes_if_possible()?;
        let mut options = options.clone();
        options.attachments.push(Attachment { name: ATTACHMENT.to_owned(), bytes: state.encode() });
        if options.parent.is_some() {
            return Ok(capture(memory, &options)?);
        }
        options.parent = memory.basis();
        match capture(memory, &options) {
            // It was forgotten meanwhile, or belongs to another store.
            Err(stillframe::Error::Store(StoreError::NoSuchSnapshot { .. })) if options.parent.is_some() => {
                options.parent = None;
                Ok(capture(memory, &options)?)
            }
            taken => Ok(taken?),
        }
    }

    /// Restores the instance to a snapshot of the same module, whether the instance is new or was
    /// in use. The memory is decoded in place.
    ///
    /// # Errors
    ///
    /// [`Error::NotAGuest`], [`Error::State`], [`Error::OtherModule`], [`Error::Table`],
    /// [`Error::CannotGrow`]: nothing is changed then. Damage: then the memory is zeros, and the
    /// only possible operation on the instance is to restore another snapshot into it.
    pub fn restore<T>(
        &mut self,
        wasm: &mut Store<T>,
        vault: &stillframe::Store,
        id: SnapshotId,
    ) -> Result<(), Error> {
        let state = state_of(vault, id)?;
        let restore = vault.restore(id)?;
        let bytes = restore.image_bytes();
        self.become_image(wasm, &state, bytes, |memory| memory.restore(restore))
    }

    /// The same, but returns at once. The memory is filled at page faults, and in the background as
    /// `fill` says. [`LazyMapping`](stillframe::lazy::LazyMapping) documents such memory. Above
    /// all, **accessing damaged memory raises a signal that ends this process** (`SIGBUS`); where
    /// damage is possible, restore in full. Host functions that pass the guest's memory to system
    /// calls need the privilege described there.
    ///
    /// The next capture waits until all is filled, and reads the whole memory; from then on writes
    /// are tracked.
    ///
    /// # Errors
    ///
    /// As [`restore`](Self::restore).
    pub fn restore_lazily<T>(
        &mut self,
        wasm: &mut Store<T>,
        vault: &stillframe::Store,
        id: SnapshotId,
        fill: Fill,
    ) -> Result<Filled, Error> {
        let state = state_of(vault, id)?;
        let restore = vault.restore(id)?;
        let bytes = restore.image_bytes();
        self.become_image(wasm, &state, bytes, |memory| memory.restore_lazily(restore, fill))
    }

    /// Turns the instance into a copy of a template: its memory is that of the template, mapped
    /// copy-on-write. Cost: some microseconds for any size (AMD EPYC, 2 cores), and one page for
    /// each page that the instance writes. If the instance is a copy already, its writes are
    /// discarded.
    ///
    /// # Errors
    ///
    /// As [`restore`](Self::restore), except for damage, which [`Template::new`] reports already.
    pub fn instantiate<T>(&mut self, wasm: &mut Store<T>, template: &Template) -> Result<(), Error> {
        let bytes = template.image.image_bytes();
        self.become_image(wasm, &template.state, bytes, |memory| memory.instantiate(&template.image))
    }

    /// Rolls the instance back to a snapshot by writing the bytes that differ. A memory that has
    /// grown since shrinks again.
    ///
    /// Cost: with tracking, it depends on what changed since the last capture and on what differs
    /// between the two snapshots; without tracking, the whole memory is compared.
    ///
    /// # Errors
    ///
    /// As [`restore`](Self::restore). After any error, including damage, the instance is unchanged.
    pub fn rollback<T>(
        &mut self,
        wasm: &mut Store<T>,
        vault: &stillframe::Store,
        id: SnapshotId,
    ) -> Result<RollbackStats, Error> {
        if lock(&self.shared).is_broken {
            return Err(Error::Broken);
        }
        let state = state_of(vault, id)?;
        let rollback = vault.rollback(id)?;
        let bytes = rollback.address_space().image_bytes();
        let before = lock(&self.shared).memory.length_bytes();
        let stats = self.become_image(wasm, &state, bytes, |memory| memory.rollback(rollback));
        if stats.is_err() && lock(&self.shared).is_broken {
            // The instance is unchanged, except that its memory has grown.
            let shrunk = lock(&self.shared).memory.set_length_bytes(before);
            self.sync_length(wasm)?;
            shrunk?;
            lock(&self.shared).is_broken = false;
        }
        stats
    }

    /// Whether all of the memory is filled. Only memory that was [restored
    /// lazily](Self::restore_lazily) may be incomplete.
    pub fn is_filled(&self) -> bool {
        lock(&self.shared).memory.is_filled()
    }

    /// The working set: the memory that was accessed before it was filled. See
    /// [`LazyMapping::touched`](stillframe::lazy::LazyMapping::touched).
    pub fn touched(&self) -> WorkingSet {
        lock(&self.shared).memory.touched()
    }

    // ---- State ----------------------------------------------------------------------------------

    fn state<T>(&self, wasm: &mut Store<T>) -> State {
        let global = |(index, global): &(u32, Global)| Some((*index, Number::of(&global.get(&mut *wasm))?));
        let globals = self.globals.iter().filter_map(global).collect();
        let tables = self.tables.iter().map(|(index, table)| (*index, table.size(&*wasm))).collect();
        State { module: self.module, globals, tables }
    }

    /// An error unless the instance can take over a state of this module.
    fn check_it_fits<T>(&self, wasm: &mut Store<T>, state: &State) -> Result<(), Error> {
        let here = self.state(wasm);
        if state.module != here.module {
            return Err(Error::OtherModule { expected: here.module, found: state.module });
        }
        let globals =
            |state: &State| state.globals.iter().map(|(index, it)| (*index, it.kind())).collect::<Vec<_>>();
        let tables = |state: &State| state.tables.iter().map(|(index, _)| *index).collect::<Vec<_>>();
        if globals(state) != globals(&here) || tables(state) != tables(&here) {
            return Err(Error::State { why: "its globals or tables are not those of the module" });
        }
        for ((index, expected), (_, found)) in state.tables.iter().zip(&here.tables) {
            if expected != found {
                return Err(Error::Table { index: *index, expected: *expected, found: *found });
            }
        }
        Ok(())
    }

    /// Turns the memory into an image, and sets the globals to the values that belong to it.
    fn become_image<T, R>(
        &mut self,
        wasm: &mut Store<T>,
        state: &State,
        image_bytes: u64,
        become_it: impl FnOnce(&mut Reservation) -> Result<R, stillframe::Error>,
    ) -> Result<R, Error> {
        self.check_it_fits(wasm, state)?;
        let page_bytes = self.memory.page_size(&*wasm);
        if !image_bytes.is_multiple_of(page_bytes) {
            return Err(Error::State { why: "the memory beside it is not whole pages" });
        }
        // The engine grows the memory, so that its limits and the store's limiter apply.
        let more_pages = (image_bytes / page_bytes).saturating_sub(self.memory.size(&*wasm));
        if more_pages > 0 {
            let grown = self.memory.grow(&mut *wasm, more_pages);
            grown.map_err(|error| Error::CannotGrow {
                wanted_bytes: image_bytes,
                why: format!("{error:#}"),
            })?;
        }
        lock(&self.shared).is_broken = true;
        let became = become_it(&mut lock(&self.shared).memory);
        // Even after an error, the engine must learn the length.
        self.sync_length(wasm)?;
        let answer = became?;
        for ((_, global), (_, number)) in self.globals.iter().zip(&state.globals) {
            let value = number.value().ok_or(Error::State { why: "it has a value of no kind" })?;
            global.set(&mut *wasm, value)?;
        }
        lock(&self.shared).is_broken = false;
        Ok(answer)
    }

    /// Grows by 0 pages, so that the engine asks the memory for its length.
    fn sync_length<T>(&self, wasm: &mut Store<T>) -> Result<(), Error> {
        self.memory.grow(wasm, 0)?;
        Ok(())
    }
}

/// The state in the attachment of a snapshot.
fn state_of(vault: &stillframe::Store, id: SnapshotId) -> Result<State, Error> {
    let bytes = vault.snapshot(id)?.attachment(ATTACHMENT)?.ok_or(Error::NotAGuest { id })?;
    State::decode(&bytes)
}

/// A hash from its 64 digits.
fn hash_of(text: &str) -> Option<Hash> {
    let mut hash = [0; Hash::BYTES];
    let digits = text.as_bytes().chunks_exact(2);
    if text.len() != 2 * hash.len() {
        return None;
    }
    for (byte, digits) in hash.iter_mut().zip(digits) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(Hash(hash))
}
