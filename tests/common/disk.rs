//! A model of a disk that loses what was not synced.
//!
//! A [`Disk`] is the witness of a directory: it performs every call and records it. The history can
//! be replayed into a [`Model`]. For every file the model knows which bytes are durable and which
//! writes are pending; for every directory it knows the same of its entries. At any moment it can
//! produce a power failure:
//!
//! ```text
//!  files         durable bytes + changes since the last sync    each 512-byte sector survives or not;
//!                                                               a lost one is zeros, or the file ends
//!  directories   durable entries + changes since the last sync  each change survives or not
//! ```
//!
//! A rename is one change. A rename between directories is durable only when both directories were
//! synced after it. That is harsher than any file system in use.
//!
//! The database makes its own calls for the index, and the witness does not see them. So the disk
//! keeps copies of the index: it takes one each time it finds that the index's files have changed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::seam::{Call, Witness};

/// A directory for many stores, in memory if possible: the disk is simulated anyway.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// The unit that a disk writes entirely or not at all.
const SECTOR_BYTES: u64 = 512;

/// Draws numbers (SplitMix64).
#[derive(Clone)]
pub(crate) struct Draw(pub(crate) u64);

impl Draw {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^ (bits >> 31)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// A random index below `count`.
    fn index(&mut self, count: usize) -> usize {
        usize::try_from(self.below(count as u64)).unwrap()
    }
}

// ---- Events -------------------------------------------------------------------------------------

type Node = usize;

/// The files of an index.
pub(crate) type IndexFiles = BTreeMap<PathBuf, Vec<u8>>;

/// Paths are relative to the watched directory.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Create(PathBuf),
    CreateDir(PathBuf),
    Write {
        file: Node,
        at_bytes: u64,
        bytes: Arc<[u8]>,
    },
    SetLength {
        file: Node,
        length_bytes: u64,
    },
    Sync {
        file: Node,
        site: String,
    },
    SyncDir {
        dir: PathBuf,
        site: String,
    },
    Rename(PathBuf, PathBuf),
    Link(PathBuf, PathBuf),
    Remove(PathBuf),
    RemoveDir(PathBuf),
    /// From here on the index has this content.
    Index(Arc<IndexFiles>),
    /// A bit of the durable content is flipped.
    Damage(PathBuf, u64),
    /// A point in the history that a test wants to find again.
    Mark(usize),
}

impl Event {
    /// The place in the program that made something durable, if the event is a sync.
    pub(crate) fn site(&self) -> Option<&str> {
        match self {
            Event::Sync { site, .. } | Event::SyncDir { site, .. } => Some(site),
            _ => None,
        }
    }
}

// ---- The model ----------------------------------------------------------------------------------

#[derive(Clone, Debug)]
enum Change {
    Write(u64, Arc<[u8]>),
    SetLength(u64),
}

#[derive(Clone, Debug, Default)]
struct File {
    durable: Vec<u8>,
    pending: Vec<Change>,
}

/// The name, the directory that has it, and the node that it refers to.
type Assignment = (Node, String, Option<Node>);

#[derive(Clone, Debug)]
struct EntryChange {
    assignments: Vec<Assignment>,
    /// The directories that were not synced after the change.
    unsynced: BTreeSet<Node>,
    is_removal: bool,
    what: &'static str,
}

type Entries = BTreeMap<(Node, String), Node>;

/// Files and directories, durable and pending. Node 0 is the watched directory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    /// `None` for a directory.
    nodes: Vec<Option<File>>,
    live: Entries,
    durable: Entries,
    pending: Vec<EntryChange>,
    /// Every version of the index, the newest last.
    pub(crate) indexes: Vec<Arc<IndexFiles>>,
}

impl Model {
    /// Writes an index, if there ever was one: 0 for none, 1 for the newest, 2 for any, 3 for a mix
    /// of two.
    pub(crate) fn crash_index(&self, which: u64, seed: u64, into: &Path) {
        let Some(newest) = self.indexes.last() else { return };
        let mut draw = Draw(seed);
        let any = |draw: &mut Draw| &self.indexes[draw.index(self.indexes.len())];
        match which {
            1 => write_index(into, newest),
            2 => write_index(into, any(&mut draw)),
            3 => {
                let mixed = mixed(any(&mut draw), newest, draw.next());
                write_index(into, &mixed);
            }
            _ => {}
        }
    }
}

/// Which pending changes of directories survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    None,
    All,
    Removals,
    NoRemovals,
    /// This percentage of them.
    Some(u64),
    /// All up to one of them, and none after it.
    UpTo,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    None,
    All,
    /// The files have their lengths, and hold zeros.
    Zeros,
    /// This percentage of the sectors.
    Some(u64),
}

/// A power failure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Failure {
    pub(crate) entries: Entry,
    pub(crate) data: Data,
    pub(crate) seed: u64,
}

impl Failure {
    /// The failures with the lowest numbers do not depend on the seed.
    pub(crate) fn numbered(number: u64, seed: u64) -> Failure {
        let mut draw = Draw(seed ^ number.wrapping_mul(0xA076_1D64_78BD_642F));
        let shares = [10, 50, 90];
        let some = |draw: &mut Draw| shares[draw.index(3)];
        let (entries, data) = match number {
            0 => (Entry::None, Data::None),
            1 => (Entry::All, Data::None),
            2 => (Entry::Removals, Data::All),
            3 => (Entry::All, Data::Zeros),
            4 => (Entry::NoRemovals, Data::None),
            5 => (Entry::None, Data::All),
            6 => (Entry::All, Data::All),
            _ => {
                let entries = match draw.below(6) {
                    0 => Entry::All,
                    1 => Entry::UpTo,
                    2 => Entry::Removals,
                    _ => Entry::Some(some(&mut draw)),
                };
                (entries, if draw.below(6) == 0 { Data::All } else { Data::Some(some(&mut draw)) })
            }
        };
        Failure { entries, data, seed: draw.next() }
    }
}

impl Model {
    pub(crate) fn new() -> Model {
        Model { nodes: vec![None], ..Model::default() }
    }

    /// The content of a directory, as durable.
    pub(crate) fn load(dir: &Path) -> Model {
        let mut model = Model::new();
        model.load_into(dir, 0);
        model.durable = model.live.clone();
        model
    }

    fn load_into(&mut self, dir: &Path, node: Node) {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            if is_of_index(&entry.path()) {
                continue;
            }
            let name = entry.file_name().into_string().unwrap();
            let is_dir = entry.file_type().unwrap().is_dir();
            let file =
                (!is_dir).then(|| File { durable: fs::read(entry.path()).unwrap(), pending: Vec::new() });
            self.nodes.push(file);
            let child = self.nodes.len() - 1;
            self.live.insert((node, name), child);
            if is_dir {
                self.load_into(&entry.path(), child);
            }
        }
    }

    fn find(&self, path: &Path) -> Option<Node> {
        path.iter().try_fold(0, |dir, name| self.live.get(&(dir, name.to_str()?.to_owned())).copied())
    }

    /// The directory's node and the name in it.
    fn place(&self, path: &Path) -> (Node, String) {
        let dir = self.find(path.parent().unwrap()).unwrap_or_else(|| panic!("{path:?} is nowhere"));
        (dir, path.file_name().unwrap().to_str().unwrap().to_owned())
    }

    fn change(&mut self, what: &'static str, assignments: Vec<Assignment>) {
        for (dir, name, node) in &assignments {
            let key = (*dir, name.clone());
            match node {
                Some(node) => drop(self.live.insert(key, *node)),
                None => drop(self.live.remove(&key)),
            }
        }
        let unsynced = assignments.iter().map(|(dir, ..)| *dir).collect();
        let is_removal = assignments.iter().all(|(_, _, node)| node.is_none());
        self.pending.push(EntryChange { assignments, unsynced, is_removal, what });
    }

    fn add(&mut self, path: &Path, what: &'static str, node: Option<File>) {
        self.nodes.push(node);
        let (dir, name) = self.place(path);
        self.change(what, vec![(dir, name, Some(self.nodes.len() - 1))]);
    }

    fn file(&mut self, file: Node) -> &mut File {
        self.nodes[file].as_mut().unwrap()
    }

    fn remove_below(&mut self, dir: Node) {
        let below: Vec<(String, Node)> = self
            .live
            .range((dir, String::new())..(dir + 1, String::new()))
            .map(|((_, name), node)| (name.clone(), *node))
            .collect();
        for (name, node) in below {
            if self.nodes[node].is_none() {
                self.remove_below(node);
            }
            self.change("remove", vec![(dir, name, None)]);
        }
    }

    pub(crate) fn apply(&mut self, event: &Event) {
        match event {
            Event::Create(path) => self.add(path, "create", Some(File::default())),
            Event::CreateDir(path) => self.add(path, "create directory", None),
            Event::Write { file, at_bytes, bytes } => {
                self.file(*file).pending.push(Change::Write(*at_bytes, bytes.clone()));
            }
            Event::SetLength { file, length_bytes } => {
                self.file(*file).pending.push(Change::SetLength(*length_bytes));
            }
            Event::Sync { file, .. } => {
                let file = self.file(*file);
                file.durable = file.crashed(Data::All, &mut Draw(0));
                file.pending.clear();
            }
            Event::SyncDir { dir, .. } => {
                let Some(dir) = self.find(dir) else { return };
                for change in &mut self.pending {
                    change.unsynced.remove(&dir);
                    if change.unsynced.is_empty() {
                        assign(&mut self.durable, &change.assignments);
                    }
                }
                self.pending.retain(|change| !change.unsynced.is_empty());
            }
            Event::Rename(from, to) => {
                let node = self.find(from).unwrap();
                let ((old_dir, old), (dir, name)) = (self.place(from), self.place(to));
                self.change("rename", vec![(old_dir, old, None), (dir, name, Some(node))]);
            }
            Event::Link(path, second) => {
                let node = self.find(path).unwrap();
                let (dir, name) = self.place(second);
                self.change("link", vec![(dir, name, Some(node))]);
            }
            Event::Remove(path) => {
                let (dir, name) = self.place(path);
                self.change("remove", vec![(dir, name, None)]);
            }
            Event::RemoveDir(path) => {
                let Some(node) = self.find(path) else { return };
                self.remove_below(node);
                let (dir, name) = self.place(path);
                self.change("remove", vec![(dir, name, None)]);
            }
            Event::Index(files) => self.indexes.push(files.clone()),
            Event::Damage(path, at) => {
                let node = self.find(path).unwrap();
                let file = self.file(node);
                assert!(file.pending.is_empty());
                file.durable[usize::try_from(*at).unwrap()] ^= 0x10;
            }
            Event::Mark(_) => {}
        }
    }

    /// The pending changes of a directory, as text.
    fn pending_in(&self, dir: &Path) -> String {
        let Some(dir) = self.find(dir) else { return String::new() };
        let pending = self.pending.iter().filter(|change| change.unsynced.contains(&dir));
        let what: BTreeSet<&str> = pending.map(|change| change.what).collect();
        what.into_iter().collect::<Vec<_>>().join(", ")
    }

    /// Writes into an empty directory what a power failure leaves, without an index.
    pub(crate) fn crash(&self, failure: Failure, into: &Path) {
        let mut draw = Draw(failure.seed);
        let mut entries = self.durable.clone();
        let up_to = draw.below(self.pending.len() as u64 + 1);
        for (number, change) in self.pending.iter().enumerate() {
            let survives = match failure.entries {
                Entry::None => false,
                Entry::All => true,
                Entry::Removals => change.is_removal,
                Entry::NoRemovals => !change.is_removal,
                Entry::Some(percent) => draw.below(100) < percent,
                Entry::UpTo => (number as u64) < up_to,
            };
            if survives {
                assign(&mut entries, &change.assignments);
            }
        }
        // A file may have two names.
        let mut files: HashMap<Node, Vec<u8>> = HashMap::new();
        let mut dirs = vec![(0, into.to_owned())];
        while let Some((dir, path)) = dirs.pop() {
            for ((_, name), node) in entries.range((dir, String::new())..(dir + 1, String::new())) {
                let path = path.join(name);
                match &self.nodes[*node] {
                    None => {
                        fs::DirBuilder::new().mode(0o700).create(&path).unwrap();
                        dirs.push((*node, path));
                    }
                    Some(file) => {
                        let bytes =
                            files.entry(*node).or_insert_with(|| file.crashed(failure.data, &mut draw));
                        write(&path, bytes);
                    }
                }
            }
        }
    }
}

fn assign(entries: &mut Entries, assignments: &[Assignment]) {
    for (dir, name, node) in assignments {
        let key = (*dir, name.clone());
        match node {
            Some(node) => drop(entries.insert(key, *node)),
            None => drop(entries.remove(&key)),
        }
    }
}

impl File {
    /// The bytes of a file after a power failure.
    fn crashed(&self, data: Data, draw: &mut Draw) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        let mut longest = bytes.len();
        // A sector that was written includes all earlier writes to it.
        let mut lost = BTreeSet::new();
        for change in &self.pending {
            match change {
                Change::SetLength(length_bytes) => {
                    let survives = match data {
                        Data::None | Data::Zeros => false,
                        Data::All => true,
                        Data::Some(percent) => draw.below(100) < percent,
                    };
                    if survives {
                        bytes.resize(usize::try_from(*length_bytes).unwrap(), 0);
                        longest = bytes.len();
                    }
                }
                Change::Write(at_bytes, new) => {
                    let end_bytes = at_bytes + new.len() as u64;
                    longest = longest.max(usize::try_from(end_bytes).unwrap());
                    let mut from = *at_bytes;
                    while from < end_bytes {
                        let to = (from / SECTOR_BYTES + 1).saturating_mul(SECTOR_BYTES).min(end_bytes);
                        let survives = match data {
                            Data::None | Data::Zeros => false,
                            Data::All => true,
                            Data::Some(percent) => {
                                let sector = from / SECTOR_BYTES;
                                if draw.below(100) >= percent {
                                    lost.insert(sector);
                                }
                                !lost.contains(&sector)
                            }
                        };
                        if survives {
                            let [from_at, to_at] = [from, to].map(|at| usize::try_from(at).unwrap());
                            let first = usize::try_from(*at_bytes).unwrap();
                            if bytes.len() < to_at {
                                bytes.resize(to_at, 0);
                            }
                            bytes[from_at..to_at].copy_from_slice(&new[from_at - first..to_at - first]);
                        }
                        from = to;
                    }
                }
            }
        }
        if data == Data::Zeros || (matches!(data, Data::Some(_)) && draw.below(2) == 0) {
            bytes.resize(longest.max(bytes.len()), 0);
        }
        bytes
    }
}

fn write(path: &Path, bytes: &[u8]) {
    let file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    io::Write::write_all(&mut file.unwrap(), bytes).unwrap();
}

/// Whether the path belongs to the index, or to one that is being written or set aside.
fn is_of_index(path: &Path) -> bool {
    path.iter().any(|name| name == "index" || name == "index.unfinished")
}

pub(crate) fn read_index(path: &Path) -> IndexFiles {
    let mut files = IndexFiles::new();
    let mut dirs = vec![path.to_owned()];
    while let Some(dir) = dirs.pop() {
        // Sled removes and renames files meanwhile.
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                dirs.push(entry.path());
            } else if let Ok(bytes) = fs::read(entry.path()) {
                files.insert(entry.path().strip_prefix(path).unwrap().to_owned(), bytes);
            }
        }
    }
    files
}

pub(crate) fn write_index(path: &Path, files: &IndexFiles) {
    for (name, bytes) in files {
        let path = path.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        write(&path, bytes);
    }
}

/// A mix of blocks of both.
pub(crate) fn mixed(old: &IndexFiles, new: &IndexFiles, seed: u64) -> IndexFiles {
    let mut draw = Draw(seed);
    let mut files = new.clone();
    for (name, bytes) in &mut files {
        let Some(old) = old.get(name) else { continue };
        for (block, old) in bytes.chunks_mut(4096).zip(old.chunks(4096)) {
            if draw.below(2) == 0 {
                let length = block.len().min(old.len());
                block[..length].copy_from_slice(&old[..length]);
            }
        }
    }
    files
}

// ---- The witness --------------------------------------------------------------------------------

/// Records what happens in a directory.
pub(crate) struct Disk {
    root: PathBuf,
    inner: Mutex<Inner>,
}

/// A file's path, length and modification time.
type Stamp = (PathBuf, u64, i64);

#[derive(Default)]
struct Inner {
    model: Model,
    history: Vec<Event>,
    inodes: HashMap<u64, Node>,
    index: Option<(PathBuf, Vec<Stamp>)>,
    /// What the program is doing, for the names of the sites.
    at_work: String,
    syncs: HashMap<String, usize>,
    renamed: HashMap<PathBuf, PathBuf>,
    /// How many changes still succeed; every call after them fails.
    changes_left: Option<usize>,
}

impl Disk {
    /// The disk of a directory and its present content.
    pub(crate) fn new(root: &Path) -> Arc<Disk> {
        let model = Model::load(root);
        let mut inodes = HashMap::new();
        for ((dir, name), node) in &model.live {
            let mut path = PathBuf::from(name);
            let mut dir = *dir;
            while dir != 0 {
                let ((above, name), _) = model.live.iter().find(|(_, node)| **node == dir).unwrap();
                path = Path::new(name).join(path);
                dir = *above;
            }
            inodes.insert(fs::metadata(root.join(path)).unwrap().ino(), *node);
        }
        Arc::new(Disk {
            root: root.to_owned(),
            inner: Mutex::new(Inner { model, inodes, ..Inner::default() }),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps copies of an index too.
    pub(crate) fn watch_index(&self, path: PathBuf) {
        self.inner().index = Some((path, Vec::new()));
    }

    /// Says what the program does from here on, for the names of the sites.
    pub(crate) fn at_work(&self, what: &str) {
        let mut inner = self.inner();
        inner.at_work = what.to_owned();
        inner.syncs.clear();
    }

    pub(crate) fn mark(&self, number: usize) {
        self.note(Event::Mark(number));
    }

    fn note(&self, event: Event) {
        let mut inner = self.inner();
        inner.model.apply(&event);
        inner.history.push(event);
    }

    /// Flips a bit of a file.
    pub(crate) fn damage(&self, path: &Path, at: u64) {
        let mut bytes = fs::read(path).unwrap();
        bytes[usize::try_from(at).unwrap()] ^= 0x10;
        fs::write(path, bytes).unwrap();
        self.note(Event::Damage(path.strip_prefix(&self.root).unwrap().to_owned(), at));
    }

    /// After this many further changes every call fails, as if the process had been killed.
    pub(crate) fn stop_after(&self, changes: usize) {
        self.inner().changes_left = Some(changes);
    }

    /// Lets calls succeed again. Returns whether the limit was reached.
    pub(crate) fn go_on(&self) -> bool {
        self.inner().changes_left.take() == Some(0)
    }

    /// The durable and pending content.
    pub(crate) fn model(&self) -> Model {
        self.inner().model.clone()
    }

    pub(crate) fn history(&self) -> Vec<Event> {
        self.inner().history.clone()
    }
}

impl Inner {
    fn copy_index(&mut self) {
        let Some((path, seen)) = &mut self.index else { return };
        let mut found = Vec::new();
        let mut dirs = vec![path.clone()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let Ok(metadata) = entry.metadata() else { continue };
                if metadata.is_dir() {
                    dirs.push(entry.path());
                }
                found.push((entry.path(), metadata.len(), metadata.mtime_nsec() ^ metadata.mtime()));
            }
        }
        found.sort();
        if found != *seen {
            *seen = found;
            let event = Event::Index(Arc::new(read_index(path)));
            self.model.apply(&event);
            self.history.push(event);
        }
    }

    fn site(&mut self, what: String) -> String {
        let key = format!("{}: {what}", self.at_work);
        let count = self.syncs.entry(key.clone()).or_default();
        *count += 1;
        format!("{key} #{}", (*count).min(2))
    }
}

impl Witness for Disk {
    fn call(&self, call: &Call<'_>, act: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        if is_of_index(call.path()) {
            return act();
        }
        let mut inner = self.inner();
        let inner = &mut *inner;
        let is_read = matches!(call, Call::Open(_) | Call::Read(_) | Call::List(_) | Call::Map(..));
        match &mut inner.changes_left {
            Some(0) => return Err(io::Error::other("the process is as good as dead")),
            Some(left) if !is_read => *left -= 1,
            _ => {}
        }
        // A killed process changes no index either.
        inner.copy_index();
        let below = |path: &Path| path.strip_prefix(&self.root).unwrap().to_owned();
        let node = |inner: &Inner, file: &fs::File| inner.inodes[&file.metadata().unwrap().ino()];
        act()?;
        let path = below(call.path());
        let event = match call {
            Call::Create(_) => {
                inner.renamed.remove(&path);
                Event::Create(path.clone())
            }
            Call::CreateDir(_) => Event::CreateDir(path.clone()),
            Call::Write { file, at_bytes, bytes, .. } => {
                Event::Write { file: node(inner, file), at_bytes: *at_bytes, bytes: Arc::from(*bytes) }
            }
            Call::SetLength { file, length_bytes, .. } => {
                Event::SetLength { file: node(inner, file), length_bytes: *length_bytes }
            }
            Call::Sync(_, file) => {
                // A file is identified by the name under which it was opened.
                let path = inner.renamed.get(&path).unwrap_or(&path);
                let kind = path.extension().map_or(path.as_os_str(), |extension| extension);
                let site = inner.site(format!("file of kind {}", kind.to_string_lossy()));
                Event::Sync { file: node(inner, file), site }
            }
            Call::SyncDir(_) => {
                let name = path
                    .file_name()
                    .map_or_else(|| "above".to_owned(), |name| name.to_string_lossy().into_owned());
                let pending = inner.model.pending_in(&path);
                let site = inner.site(format!("directory {name} with [{pending}]"));
                Event::SyncDir { dir: path.clone(), site }
            }
            Call::Rename(_, to) => {
                inner.renamed.insert(path.clone(), below(to));
                Event::Rename(path.clone(), below(to))
            }
            Call::Link(_, second) => Event::Link(path.clone(), below(second)),
            Call::Remove(_) => Event::Remove(path.clone()),
            Call::RemoveDir(_) => Event::RemoveDir(path.clone()),
            _ => return Ok(()),
        };
        inner.model.apply(&event);
        if let Event::Create(path) = &event {
            let created = inner.model.nodes.len() - 1;
            inner.inodes.insert(fs::metadata(self.root.join(path)).unwrap().ino(), created);
        }
        inner.history.push(event);
        Ok(())
    }
}

/// A witness that syncs nothing, for tests that only read what a power failure left: there is no
/// second power failure.
pub(crate) struct NothingDurable;

impl Witness for NothingDurable {
    fn call(&self, call: &Call<'_>, act: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        match call {
            Call::Sync(..) | Call::SyncDir(_) => Ok(()),
            _ => act(),
        }
    }
}
