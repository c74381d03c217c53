//! A guest: one instance whose state is captured, restored and rolled back between calls.

use stillframe::{
    Attachment, Capture, CaptureOptions, Fill, Filled, Hash, HotSet, PendingCapture, Process, Reservation,
    RollBackStats, SnapshotId, StoreError,
};
use wasmtime::{Extern, Global, Instance, Memory, Store, Table};

use crate::error::Error;
use crate::prepare::PREFIX;
use crate::state::{ATTACHMENT, Number, State};
use crate::sys::{self, Ours, Shared, lock};

/// An instance of a [prepared](crate::prepare) module, in a store of an [engine](crate::engine) made for it.
///
/// All its methods take the store by `&mut Store`, which nobody has while WebAssembly runs or a host function is
/// called: so what is captured and restored is always an instance between two calls. With the store of another
/// instance they panic, as Wasmtime does, and with a store whose limiter is asynchronous.
///
/// What a snapshot holds: the linear memory, every mutable global of a number type, and of tables the sizes, which
/// are compared. What it does not hold: elements of tables and other references
/// ([`Prepared::left_out`](crate::Prepared::left_out) tells whether the module has such), the store's data, fuel and
/// limits, and whatever the host did for the guest.
///
/// From its first capture or restore on what the instance writes is tracked, by write protection or by what a
/// template's instance has of its own, where the machine can; so each capture costs what was written since the last,
/// and a rollback what differs.
#[derive(Debug)]
pub struct Guest {
    memory: Memory,
    shared: Shared,
    globals: Vec<(u32, Global)>,
    tables: Vec<(u32, Table)>,
    module: Hash,
}

/// A snapshot of a guest, restored once, of which instances become copies in microseconds. See
/// [`Guest::instantiate`].
#[derive(Clone, Debug)]
pub struct Template {
    image: stillframe::Template,
    state: State,
}

impl Template {
    /// Restores a snapshot once. It needs the store no longer then. Cost: that of a full restore, and as much
    /// memory as the snapshot has that is not zeros.
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
    /// [`Error::NotPrepared`]; [`Error::Engine`] if the memory was not made by an engine of this crate.
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

    /// The snapshot that the instance is known to be like but for what it has written since: the parent of the next
    /// capture. None before the first one.
    pub fn basis(&self) -> Option<SnapshotId> {
        lock(&self.shared).memory.basis()
    }

    /// Takes a snapshot. Its parent, unless `options` name one, is the snapshot that the instance was last captured
    /// as, restored from or rolled back to: so history branches where the instance did.
    ///
    /// Cost: what was written since. It returns when the snapshot is durable;
    /// [`start_capture`](Self::start_capture) when the instance may go on.
    ///
    /// # Errors
    ///
    /// [`Error::Broken`]; as [`Process::capture`].
    pub fn capture<T>(
        &mut self,
        wasm: &mut Store<T>,
        process: &Process<'_>,
        options: &CaptureOptions,
    ) -> Result<Capture, Error> {
        self.capture_by(wasm, options, |memory, options| process.capture(memory, options))
    }

    /// Takes a snapshot and returns as soon as what changed is copied: see [`Process::start_capture`].
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
            // Forgotten meanwhile, or of another store.
            Err(stillframe::Error::Store(StoreError::NoSuchSnapshot { .. })) if options.parent.is_some() => {
                options.parent = None;
                Ok(capture(memory, &options)?)
            }
            taken => Ok(taken?),
        }
    }

    /// The instance becomes what it was in a snapshot of the same module, whatever it was before: new, or in use for
    /// a long time. The memory is decoded in place.
    ///
    /// # Errors
    ///
    /// [`Error::NotAGuest`], [`Error::State`], [`Error::OtherModule`], [`Error::Table`], [`Error::CannotGrow`]:
    /// nothing is changed then. Damage: then its memory is zeros, and nothing can be done with the instance
    /// but to restore another snapshot into it.
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

    /// The same, at once, with memory that is read when it is touched, and filled in the background as `fill`
    /// says. What is to be known about such memory [`LazyMapping`](stillframe::LazyMapping) tells: above all that
    /// **touching what is damaged is a signal that ends this process** (`SIGBUS`); where that may be, restore in full.
    /// Host functions that give the guest's memory to system calls need the right that is told there.
    ///
    /// The next capture waits until all is filled, and reads all of it; from then on it is tracked.
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

    /// The instance becomes a copy of a template: its memory is that of the template, mapped copy-on-write. Some
    /// microseconds, whatever its size, and a page for each that it writes. An instance that has been one already
    /// begins anew.
    ///
    /// # Errors
    ///
    /// As [`restore`](Self::restore), but for damage, which the template has met already.
    pub fn instantiate<T>(&mut self, wasm: &mut Store<T>, template: &Template) -> Result<(), Error> {
        let bytes = template.image.image_bytes();
        self.become_image(wasm, &template.state, bytes, |memory| memory.instantiate(&template.image))
    }

    /// The instance becomes what it was in a snapshot, by writing what differs. A memory that has grown since becomes
    /// shorter again.
    ///
    /// Cost: with tracking what changed since the last capture and what differs between the two snapshots;
    /// else all of it is compared.
    ///
    /// # Errors
    ///
    /// As [`restore`](Self::restore); whatever it is, damage too, the instance stays as it was.
    pub fn roll_back<T>(
        &mut self,
        wasm: &mut Store<T>,
        vault: &stillframe::Store,
        id: SnapshotId,
    ) -> Result<RollBackStats, Error> {
        if lock(&self.shared).is_broken {
            return Err(Error::Broken);
        }
        let state = state_of(vault, id)?;
        let roll_back = vault.roll_back(id)?;
        let bytes = roll_back.address_space().image_bytes();
        let before = lock(&self.shared).memory.length_bytes();
        let stats = self.become_image(wasm, &state, bytes, |memory| memory.roll_back(roll_back));
        if stats.is_err() && lock(&self.shared).is_broken {
            // It is as it was, but for what it was made to grow by.
            let shrunk = lock(&self.shared).memory.set_length_bytes(before);
            self.sync_length(wasm)?;
            shrunk?;
            lock(&self.shared).is_broken = false;
        }
        stats
    }

    /// Whether all of the memory is there. Only one that was [restored lazily](Self::restore_lazily) may not be.
    pub fn is_filled(&self) -> bool {
        lock(&self.shared).memory.is_filled()
    }

    /// What was touched before it was filled: see [`LazyMapping::touched`](stillframe::LazyMapping::touched).
    pub fn touched(&self) -> HotSet {
        lock(&self.shared).memory.touched()
    }

    // ---- State ----------------------------------------------------------------------------------

    fn state<T>(&self, wasm: &mut Store<T>) -> State {
        let global = |(index, global): &(u32, Global)| Some((*index, Number::of(&global.get(&mut *wasm))?));
        let globals = self.globals.iter().filter_map(global).collect();
        let tables = self.tables.iter().map(|(index, table)| (*index, table.size(&*wasm))).collect();
        State { module: self.module, globals, tables }
    }

    /// An error unless a state of this module can become that of the instance.
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

    /// Has the memory become an image, and the globals what they were with it.
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
        // By the engine, so that its limits and the store's limiter are asked.
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
        // Whatever has come of it, the engine must know the length.
        self.sync_length(wasm)?;
        let answer = became?;
        for ((_, global), (_, number)) in self.globals.iter().zip(&state.globals) {
            let value = number.value().ok_or(Error::State { why: "it has a value of no kind" })?;
            global.set(&mut *wasm, value)?;
        }
        lock(&self.shared).is_broken = false;
        Ok(answer)
    }

    /// Growing by nothing, the engine asks the memory for its length.
    fn sync_length<T>(&self, wasm: &mut Store<T>) -> Result<(), Error> {
        self.memory.grow(wasm, 0)?;
        Ok(())
    }
}

/// What a snapshot holds beside the memory.
fn state_of(vault: &stillframe::Store, id: SnapshotId) -> Result<State, Error> {
    let bytes = vault.snapshot(id)?.attachment(ATTACHMENT)?.ok_or(Error::NotAGuest { id })?;
    State::decode(&bytes)
}

/// A hash by its 64 digits.
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
