//! Entries: exactly the ones that a replay needs in addition to memory and threads.
//!
//! A journal is a log, but a snapshot stands alone. So each snapshot keeps all entries of its line
//! up to its mark, without those that are superseded:
//!
//! | superseded | by |
//! |---|---|
//! | all of a file that was only read, a socket, a pipe, an event | closing its last descriptor |
//! | a write to a file | another write of exactly the same range |
//! | the content of a closed file | unlinking it, truncating it at open, or renaming over it |
//! | all entries of a closed file | creating it again |
//! | a seek, flags, the terminal's settings | the next one of the descriptor, if adjacent |
//! | querying an offset | itself: it has no effect |
//! | output to stdout and stderr | itself: it was printed and is not printed again |
//!
//! If it is not certain that a rule applies, the entry stays. Once there is a link, nothing is
//! known about contents. After the working directory or a directory's name changed, nothing is
//! known about earlier paths.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::mem::discriminant;

use wasmer_journal::JournalEntry;
use wasmer_wasix_types::wasi::{Fdflags, Oflags, Whence};

type Fd = u32;
type Object = usize;

/// The entries of a line, in order.
#[derive(Debug)]
pub(crate) struct Entries {
    /// A superseded entry leaves a hole until the next mark.
    list: Vec<Option<JournalEntry<'static>>>,
    /// How many of them precede the last mark.
    marked: usize,
    objects: HashMap<Object, State>,
    next_object: Object,
    open: HashMap<Fd, Object>,
    /// The descriptors that print: the first two after standard input, and their copies.
    stdio: HashSet<Fd>,
    terminal: Option<usize>,
    /// Whether there may be files with several names.
    linked: bool,
    /// Whether anything was renamed. After a rename, Wasmer may find a file that was open before
    /// only because another file was opened since. So from then on, the entry that opened the other
    /// file is not superseded.
    renamed: bool,
}

/// An object that descriptors refer to.
#[derive(Debug, Default)]
struct State {
    descriptors: BTreeSet<Fd>,
    /// Its own entries, and those of an epoll that watch it.
    entries: Vec<usize>,
    /// Whether it had an effect that outlives it, or that other entries depend on.
    lasting: bool,
    /// Whether other entries depend on it.
    built_on: bool,
    /// The directory and path by which it was opened, until something else may have that path.
    path: Option<(Fd, String)>,
    /// Entries that wrote its content; those at a known position are also in `written`, by
    /// position.
    contents: Vec<usize>,
    written: HashMap<(u64, usize), usize>,
    is_file: bool,
    appends: bool,
}

impl Default for Entries {
    fn default() -> Self {
        Entries {
            list: Vec::new(),
            marked: 0,
            objects: HashMap::new(),
            next_object: 0,
            open: HashMap::new(),
            stdio: HashSet::from([1, 2]),
            terminal: None,
            linked: false,
            renamed: false,
        }
    }
}

impl Entries {
    /// Adds an entry that concerns neither memory nor threads.
    pub(crate) fn push(&mut self, entry: JournalEntry<'static>) {
        use JournalEntry as E;
        let at = self.list.len();
        match &entry {
            E::OpenFileDescriptorV1 { fd, dirfd, path, o_flags, fs_flags, .. }
            | E::OpenFileDescriptorV2 { fd, dirfd, path, o_flags, fs_flags, .. } => {
                self.others_build_on(*dirfd);
                let path = (*dirfd, path.to_string());
                if o_flags.contains(Oflags::TRUNC) {
                    self.truncate(&path, o_flags.contains(Oflags::CREATE));
                }
                let state = State {
                    lasting: o_flags.intersects(Oflags::CREATE | Oflags::TRUNC),
                    path: Some(path),
                    is_file: true,
                    appends: fs_flags.contains(Fdflags::APPEND),
                    ..State::default()
                };
                // Its position is the end of the file.
                if state.appends {
                    self.objects.values_mut().for_each(|state| state.written.clear());
                }
                self.create(state, &[*fd]);
            }
            E::SocketOpenV1 { fd, .. }
            | E::SocketAcceptedV1 { fd, .. }
            | E::CreateEventV1 { fd, .. }
            | E::EpollCreateV1 { fd } => self.create(State::default(), &[*fd]),
            E::CreatePipeV1 { read_fd: one, write_fd: other } | E::SocketPairV1 { fd1: one, fd2: other } => {
                self.create(State::default(), &[*one, *other]);
            }
            E::DuplicateFileDescriptorV1 { original_fd: from, copied_fd: to }
            | E::DuplicateFileDescriptorV2 { original_fd: from, copied_fd: to, .. }
                if from != to =>
            {
                self.stand_for(*from, *to);
            }
            E::RenumberFileDescriptorV1 { old_fd: from, new_fd: to } if from != to => {
                self.stand_for(*from, *to);
                self.stdio.remove(from);
                if let Some(object) = self.open.remove(from)
                    && let Some(state) = self.objects.get_mut(&object)
                {
                    state.descriptors.remove(from);
                    state.entries.push(at);
                }
                self.list.push(Some(entry));
                return;
            }
            E::CloseFileDescriptorV1 { fd } => {
                self.stdio.remove(fd);
                let (fd, closed) = (*fd, self.open.remove(fd));
                self.list.push(Some(entry));
                if let Some(object) = closed {
                    self.note(object, at);
                    self.close(object, fd);
                }
                return;
            }
            E::FileDescriptorWriteV1 { fd, .. } if self.stdio.contains(fd) => return,
            E::FileDescriptorSeekV1 { offset: 0, whence: Whence::Cur, .. } => return,
            E::FileDescriptorWriteV1 { fd, offset, data, .. } => {
                let place = (*offset, data.len());
                let superseded = self.object(*fd).and_then(|state| {
                    state.lasting |= state.is_file;
                    state.contents.push(at);
                    let keep = !state.is_file || state.appends;
                    if keep { None } else { state.written.insert(place, at) }
                });
                if let Some(superseded) = superseded {
                    self.list[superseded] = None;
                }
            }
            E::FileDescriptorSetSizeV1 { fd, .. } | E::FileDescriptorAllocateV1 { fd, .. } => {
                if let Some(state) = self.object(*fd) {
                    state.lasting |= state.is_file;
                    state.contents.push(at);
                    // The written bytes may have been cut off, and may be written again.
                    state.written.clear();
                }
            }
            E::FileDescriptorSetTimesV1 { fd, .. } => {
                if let Some(state) = self.object(*fd) {
                    state.lasting = true;
                }
            }
            E::FileDescriptorSetFlagsV1 { fd, flags } => {
                if let Some(state) = self.object(*fd) {
                    state.appends |= flags.contains(Fdflags::APPEND);
                }
                self.supersede_last(*fd, &entry);
            }
            // The seek is relative to the position or to the end of the file: both depend on what
            // was written.
            E::FileDescriptorSeekV1 { fd, whence, .. } if *whence != Whence::Set => {
                if let Some(state) = self.object(*fd) {
                    state.written.clear();
                }
            }
            E::FileDescriptorSeekV1 { fd, .. } | E::FileDescriptorSetFdFlagsV1 { fd, .. } => {
                self.supersede_last(*fd, &entry);
            }
            E::TtySetV1 { .. } => {
                if let Some(superseded) = self.terminal.replace(at) {
                    self.list[superseded] = None;
                }
            }
            E::EpollCtlV1 { fd, .. } => {
                if let Some(&watched) = self.open.get(fd) {
                    self.note(watched, at);
                }
            }
            E::SocketSendFileV1 { file_fd, .. } => self.others_build_on(*file_fd),
            E::PathRenameV1 { old_fd, old_path, new_fd, new_path } => {
                self.others_build_on(*old_fd);
                self.others_build_on(*new_fd);
                self.renamed = true;
                self.rename((*old_fd, old_path.to_string()), (*new_fd, new_path.to_string()));
            }
            E::CreateHardLinkV1 { old_fd, new_fd, .. } => {
                self.others_build_on(*old_fd);
                self.others_build_on(*new_fd);
                self.linked = true;
            }
            E::CreateSymbolicLinkV1 { fd, .. } => {
                self.others_build_on(*fd);
                self.linked = true;
            }
            E::UnlinkFileV1 { fd, path } => {
                self.others_build_on(*fd);
                let path = (*fd, path.to_string());
                self.drop_contents(&path);
                self.objects
                    .values_mut()
                    .filter(|it| it.path.as_ref() == Some(&path))
                    .for_each(|it| it.path = None);
            }
            E::ChangeDirectoryV1 { .. } => self.forget_paths(),
            E::PathSetTimesV1 { fd, path, .. } => {
                self.others_build_on(*fd);
                let path = (*fd, path.to_string());
                self.objects
                    .values_mut()
                    .filter(|it| it.path.as_ref() == Some(&path))
                    .for_each(|it| it.path = None);
            }
            E::CreateDirectoryV1 { fd, .. } | E::RemoveDirectoryV1 { fd, .. } => self.others_build_on(*fd),
            _ => {}
        }
        if let Some(object) = owner(&entry).and_then(|fd| self.open.get(&fd).copied()) {
            self.note(object, at);
        }
        self.list.push(Some(entry));
    }

    /// Adds a mark: the entries before it are in the snapshot.
    pub(crate) fn mark(&mut self) {
        self.close_up();
        self.marked = self.list.len();
    }

    /// A life of the process ended without a mark after these entries. The runtime defers some
    /// entries until a mark; these never took effect for the next life. The others did take effect,
    /// because the next life replayed them.
    pub(crate) fn abandon(&mut self) {
        self.close_up();
        let marked = self.marked;
        let all: Vec<JournalEntry<'static>> = std::mem::take(self).list.into_iter().flatten().collect();
        let mut real = HashSet::new();
        for (at, entry) in all.into_iter().enumerate() {
            let is_put_off = is_put_off(&entry, &mut real);
            if at < marked || !is_put_off {
                self.push(entry);
            }
        }
        self.mark();
    }

    /// All of them, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &JournalEntry<'static>> {
        self.list.iter().flatten()
    }

    fn object(&mut self, fd: Fd) -> Option<&mut State> {
        self.open.get(&fd).and_then(|object| self.objects.get_mut(object))
    }

    fn note(&mut self, object: Object, at: usize) {
        if let Some(state) = self.objects.get_mut(&object) {
            state.entries.push(at);
        }
    }

    fn others_build_on(&mut self, fd: Fd) {
        if let Some(state) = self.object(fd) {
            state.lasting = true;
            state.built_on = true;
        }
    }

    /// From here on these descriptors refer to a new object. The caller is about to push the entry
    /// that creates it.
    fn create(&mut self, mut state: State, descriptors: &[Fd]) {
        let at = self.list.len();
        let mut replaces = false;
        for fd in descriptors {
            self.stdio.remove(fd);
            if let Some(before) = self.open.remove(fd) {
                self.replace(before, *fd);
                replaces = true;
            }
        }
        let object = self.next_object;
        self.next_object += 1;
        state.descriptors.extend(descriptors);
        state.lasting |= replaces;
        state.built_on |= replaces;
        state.entries.push(at);
        self.open.extend(descriptors.iter().map(|fd| (*fd, object)));
        self.objects.insert(object, state);
    }

    /// From here on `to` refers to the object of `from`. The caller is about to push the entry that
    /// makes the copy.
    fn stand_for(&mut self, from: Fd, to: Fd) {
        let object = self.open.get(&from).copied();
        let before = self.open.remove(&to).filter(|before| Some(*before) != object);
        if let Some(before) = before {
            self.replace(before, to);
        }
        match self.stdio.contains(&from) {
            true => self.stdio.insert(to),
            false => self.stdio.remove(&to),
        };
        if let Some(object) = object {
            self.open.insert(to, object);
            if let Some(state) = self.objects.get_mut(&object) {
                state.descriptors.insert(to);
                // Without the entry that the caller is about to push, the replaced object would
                // stay open.
                state.lasting |= before.is_some();
                state.built_on |= before.is_some();
            }
        }
    }

    /// An object lost a descriptor because another object replaced it. Its entries stay, because
    /// only the other object's entries end it.
    fn replace(&mut self, object: Object, fd: Fd) {
        if let Some(state) = self.objects.get_mut(&object) {
            state.descriptors.remove(&fd);
            state.lasting = true;
            state.built_on = true;
        }
    }

    /// An object lost a descriptor because it was closed.
    fn close(&mut self, object: Object, fd: Fd) {
        let Some(state) = self.objects.get_mut(&object) else { return };
        state.descriptors.remove(&fd);
        let has_effect = state.lasting || state.is_file && self.renamed;
        if state.descriptors.is_empty() && !has_effect {
            for entry in std::mem::take(&mut state.entries) {
                self.list[entry] = None;
            }
            self.objects.remove(&object);
        }
    }

    /// Supersedes the last entry of a descriptor's object, if it is of the same kind and for the
    /// same descriptor.
    fn supersede_last(&mut self, fd: Fd, by: &JournalEntry<'static>) {
        let Some(last) = self.object(fd).and_then(|state| state.entries.last().copied()) else { return };
        let is_same = self.list[last]
            .as_ref()
            .is_some_and(|last| discriminant(last) == discriminant(by) && owner(last) == Some(fd));
        if is_same {
            self.list[last] = None;
        }
    }

    fn forget_paths(&mut self) {
        self.objects.values_mut().for_each(|state| state.path = None);
    }

    /// Whether a descriptor may be open on a file of this name, however it was opened.
    fn may_be_open(&self, path: &(Fd, String)) -> bool {
        self.objects.values().any(|state| {
            let unknown = state.is_file && state.path.is_none();
            !state.descriptors.is_empty() && (unknown || may_be(state, path))
        })
    }

    /// Drops the entries that wrote to closed files that were opened by this path: their content no
    /// longer exists.
    fn drop_contents(&mut self, path: &(Fd, String)) {
        // The position of a descriptor may depend on the file's length.
        if self.linked || self.may_be_open(path) {
            return;
        }
        for state in self.objects.values_mut() {
            if state.path.as_ref() == Some(path) && state.descriptors.is_empty() {
                for entry in std::mem::take(&mut state.contents) {
                    self.list[entry] = None;
                }
                state.written.clear();
                state.path = None;
            }
        }
    }

    /// A file is about to be opened by this path and truncated; if `makes`, it is created if it
    /// does not exist.
    fn truncate(&mut self, path: &(Fd, String), makes: bool) {
        let is_over = |state: &State| {
            state.path.as_ref() == Some(path) && state.descriptors.is_empty() && !state.built_on
        };
        // A remaining entry must not open a file that is created only later.
        let nothing_else = |state: &State| is_over(state) || !may_be(state, path);
        if makes && !self.linked && !self.may_be_open(path) && self.objects.values().all(nothing_else) {
            for (_, state) in self.objects.extract_if(|_, state| is_over(state)) {
                state.entries.iter().for_each(|entry| self.list[*entry] = None);
            }
        }
        self.drop_contents(path);
    }

    fn rename(&mut self, from: (Fd, String), to: (Fd, String)) {
        let is_file = self
            .objects
            .values()
            .any(|state| state.path.as_ref() == Some(&from) && !state.contents.is_empty());
        if !is_file {
            // It may be a directory; then everything in it has other paths now.
            self.forget_paths();
            return;
        }
        self.drop_contents(&to);
        for state in self.objects.values_mut() {
            if state.path.as_ref() == Some(&to) {
                state.path = None;
            } else if state.path.as_ref() == Some(&from) {
                state.path = Some(to.clone());
                state.built_on = true;
            }
        }
    }

    /// Closes the holes, and renumbers all references to entries.
    fn close_up(&mut self) {
        let mut kept = 0..;
        let places: Vec<Option<usize>> =
            self.list.iter().map(|entry| entry.as_ref().and_then(|_| kept.next())).collect();
        self.marked = places[..self.marked.min(places.len())].iter().flatten().count();
        self.list.retain(Option::is_some);
        let moved = |at: &usize| places.get(*at).copied().flatten();
        self.terminal = self.terminal.as_ref().and_then(moved);
        for state in self.objects.values_mut() {
            state.entries = state.entries.iter().filter_map(moved).collect();
            state.contents = state.contents.iter().filter_map(moved).collect();
            state.written =
                state.written.drain().filter_map(|(at, entry)| Some((at, moved(&entry)?))).collect();
        }
        // An object that is closed and can lose no more entries is dropped.
        self.objects.retain(|_, state| !state.descriptors.is_empty() || state.path.is_some());
    }
}

/// Whether a file may be the one at a path, because its own path ends with the same name.
fn may_be(state: &State, (_, path): &(Fd, String)) -> bool {
    state.path.as_ref().is_some_and(|(_, other)| name(other) == name(path))
}

/// The last component of a path.
fn name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// The descriptor whose object an entry concerns, if that object is open already.
fn owner(entry: &JournalEntry<'_>) -> Option<Fd> {
    use JournalEntry as E;
    match entry {
        E::FileDescriptorSeekV1 { fd, .. }
        | E::FileDescriptorWriteV1 { fd, .. }
        | E::FileDescriptorSetTimesV1 { fd, .. }
        | E::FileDescriptorSetFdFlagsV1 { fd, .. }
        | E::FileDescriptorSetFlagsV1 { fd, .. }
        | E::FileDescriptorSetRightsV1 { fd, .. }
        | E::FileDescriptorSetSizeV1 { fd, .. }
        | E::FileDescriptorAdviseV1 { fd, .. }
        | E::FileDescriptorAllocateV1 { fd, .. }
        | E::DuplicateFileDescriptorV1 { original_fd: fd, .. }
        | E::DuplicateFileDescriptorV2 { original_fd: fd, .. }
        | E::EpollCtlV1 { epfd: fd, .. }
        | E::SocketListenV1 { fd, .. }
        | E::SocketBindV1 { fd, .. }
        | E::SocketConnectedV1 { fd, .. }
        | E::SocketJoinIpv4MulticastV1 { fd, .. }
        | E::SocketJoinIpv6MulticastV1 { fd, .. }
        | E::SocketLeaveIpv4MulticastV1 { fd, .. }
        | E::SocketLeaveIpv6MulticastV1 { fd, .. }
        | E::SocketSendFileV1 { socket_fd: fd, .. }
        | E::SocketSendToV1 { fd, .. }
        | E::SocketSendV1 { fd, .. }
        | E::SocketSetOptFlagV1 { fd, .. }
        | E::SocketSetOptSizeV1 { fd, .. }
        | E::SocketSetOptTimeV1 { fd, .. }
        | E::SocketShutdownV1 { fd, .. } => Some(*fd),
        _ => None,
    }
}

/// Whether the runtime, in a replay, defers an entry until the next mark. It executes entries at
/// once that concern the file system, and entries for descriptors that it opened itself: those in
/// `real`.
fn is_put_off(entry: &JournalEntry<'_>, real: &mut HashSet<u32>) -> bool {
    use JournalEntry as E;
    match entry {
        E::OpenFileDescriptorV1 { fd, .. } | E::OpenFileDescriptorV2 { fd, .. } => {
            real.insert(*fd);
            false
        }
        E::DuplicateFileDescriptorV1 { original_fd, copied_fd }
        | E::DuplicateFileDescriptorV2 { original_fd, copied_fd, .. } => {
            let is_real = real.contains(original_fd);
            real.insert(*copied_fd);
            !is_real
        }
        E::RenumberFileDescriptorV1 { old_fd, .. } => !real.remove(old_fd),
        E::FileDescriptorSeekV1 { fd, .. }
        | E::FileDescriptorWriteV1 { fd, .. }
        | E::CloseFileDescriptorV1 { fd }
        | E::PathSetTimesV1 { fd, .. }
        | E::FileDescriptorSetTimesV1 { fd, .. }
        | E::FileDescriptorSetFdFlagsV1 { fd, .. }
        | E::FileDescriptorSetFlagsV1 { fd, .. }
        | E::FileDescriptorSetRightsV1 { fd, .. }
        | E::FileDescriptorSetSizeV1 { fd, .. }
        | E::FileDescriptorAdviseV1 { fd, .. }
        | E::FileDescriptorAllocateV1 { fd, .. } => !real.contains(fd),
        E::RemoveDirectoryV1 { .. }
        | E::UnlinkFileV1 { .. }
        | E::PathRenameV1 { .. }
        | E::SetClockTimeV1 { .. }
        | E::CreateDirectoryV1 { .. }
        | E::CreateHardLinkV1 { .. }
        | E::CreateSymbolicLinkV1 { .. }
        | E::ChangeDirectoryV1 { .. }
        | E::PortAddAddrV1 { .. }
        | E::PortDelAddrV1 { .. }
        | E::PortAddrClearV1
        | E::PortBridgeV1 { .. }
        | E::PortUnbridgeV1
        | E::PortDhcpAcquireV1
        | E::PortGatewaySetV1 { .. }
        | E::PortRouteAddV1 { .. }
        | E::PortRouteClearV1
        | E::PortRouteDelV1 { .. } => false,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{close, open, seek, write};

    fn left(entries: impl IntoIterator<Item = JournalEntry<'static>>) -> Vec<JournalEntry<'static>> {
        let mut kept = Entries::default();
        entries.into_iter().for_each(|entry| kept.push(entry));
        let found: Vec<_> = kept.iter().cloned().collect();
        kept.mark();
        let marked: Vec<_> = kept.iter().cloned().collect();
        assert_eq!(marked, found, "closing the holes changes nothing");
        let mut again = Entries::default();
        found.iter().cloned().for_each(|entry| again.push(entry));
        assert_eq!(again.iter().cloned().collect::<Vec<_>>(), found, "what is superseded is so at once");
        found
    }

    fn dup(from: Fd, to: Fd) -> JournalEntry<'static> {
        JournalEntry::DuplicateFileDescriptorV1 { original_fd: from, copied_fd: to }
    }

    fn append(fd: Fd, path: &'static str) -> JournalEntry<'static> {
        let mut entry = open(fd, path, READ);
        if let JournalEntry::OpenFileDescriptorV2 { fs_flags, .. } = &mut entry {
            *fs_flags = Fdflags::APPEND;
        }
        entry
    }

    fn unlink(path: &'static str) -> JournalEntry<'static> {
        JournalEntry::UnlinkFileV1 { fd: 3, path: path.into() }
    }

    fn rename(from: &'static str, to: &'static str) -> JournalEntry<'static> {
        JournalEntry::PathRenameV1 { old_fd: 3, old_path: from.into(), new_fd: 3, new_path: to.into() }
    }

    fn link(from: &'static str, to: &'static str) -> JournalEntry<'static> {
        JournalEntry::CreateHardLinkV1 {
            old_fd: 3,
            old_path: from.into(),
            old_flags: 0,
            new_fd: 3,
            new_path: to.into(),
        }
    }

    const READ: Oflags = Oflags::empty();
    const MAKE: Oflags = Oflags::CREATE;

    /// The indexes of those of `entries` that are superseded, in order.
    fn superseded(entries: Vec<JournalEntry<'static>>) -> Vec<usize> {
        let left = left(entries.clone());
        let mut left = left.iter().peekable();
        let gone = entries.iter().enumerate().filter(|(_, entry)| left.next_if_eq(entry).is_none());
        let gone = gone.map(|(at, _)| at).collect();
        assert!(left.next().is_none(), "nothing is made up or put elsewhere");
        gone
    }

    #[test]
    fn only_what_is_superseded_is_left_out() {
        let truncate = Oflags::CREATE | Oflags::TRUNC;
        let cases: Vec<(&str, Vec<JournalEntry<'static>>, Vec<usize>)> = vec![
            ("a file that is open", vec![open(4, "a", READ), seek(4, 5, Whence::Set)], vec![]),
            (
                "one that was only read",
                vec![open(4, "a", READ), seek(4, 5, Whence::Set), close(4)],
                vec![0, 1, 2],
            ),
            ("one that was made", vec![open(4, "a", MAKE), close(4)], vec![]),
            ("one that was written", vec![open(4, "a", READ), write(4, 0, "x"), close(4)], vec![]),
            ("a copy holds it", vec![open(4, "a", READ), dup(4, 5), close(4)], vec![]),
            (
                "the copy is closed too",
                vec![open(4, "a", READ), dup(4, 5), close(4), close(5)],
                vec![0, 1, 2, 3],
            ),
            (
                "a directory others were opened in",
                vec![
                    open(4, "a", READ),
                    JournalEntry::CreateDirectoryV1 { fd: 4, path: "b".into() },
                    close(4),
                ],
                vec![],
            ),
            (
                "a number used again",
                vec![open(4, "a", READ), close(4), open(4, "b", READ), seek(4, 1, Whence::Set)],
                vec![0, 1],
            ),
            (
                "a copy over another one",
                vec![open(4, "a", READ), open(5, "b", READ), dup(4, 5), close(5), close(4)],
                vec![],
            ),
            ("stdout", vec![write(1, 0, "x"), write(2, 0, "x"), dup(1, 7), write(7, 1, "y")], vec![0, 1, 3]),
            ("stdout that is a file now", vec![open(4, "a", MAKE), dup(4, 1), write(1, 0, "x")], vec![]),
            (
                "a place written twice",
                vec![open(4, "a", MAKE), write(4, 0, "xy"), write(4, 1, "z"), write(4, 0, "uv")],
                vec![1],
            ),
            (
                "… but for what is cut off",
                vec![
                    open(4, "a", MAKE),
                    write(4, 0, "xy"),
                    JournalEntry::FileDescriptorSetSizeV1 { fd: 4, st_size: 1 },
                    write(4, 0, "uv"),
                ],
                vec![],
            ),
            (
                "… but for what goes from there",
                vec![open(4, "a", MAKE), write(4, 0, "xy"), seek(4, -2, Whence::Cur), write(4, 0, "uv")],
                vec![],
            ),
            (
                "… and for what stands at the end",
                vec![open(4, "a", MAKE), write(4, 0, "xy"), append(5, "a"), write(4, 0, "uv")],
                vec![],
            ),
            (
                "a file that was only read, but after something was renamed",
                vec![open(4, "a", READ), close(4), rename("b", "a"), open(4, "c", READ), close(4)],
                vec![0, 1],
            ),
            (
                "a pipe is no file",
                vec![
                    JournalEntry::CreatePipeV1 { read_fd: 4, write_fd: 5 },
                    write(5, 0, "x"),
                    write(5, 0, "y"),
                ],
                vec![],
            ),
            (
                "a pipe of which one end is closed",
                vec![JournalEntry::CreatePipeV1 { read_fd: 4, write_fd: 5 }, close(5)],
                vec![],
            ),
            (
                "a pipe that is closed",
                vec![
                    JournalEntry::CreatePipeV1 { read_fd: 4, write_fd: 5 },
                    write(5, 0, "x"),
                    close(4),
                    close(5),
                ],
                vec![0, 1, 2, 3],
            ),
            (
                "seeks",
                vec![
                    open(4, "a", READ),
                    seek(4, 1, Whence::Set),
                    seek(4, 2, Whence::Set),
                    seek(4, 0, Whence::Cur),
                ],
                vec![1, 3],
            ),
            (
                "a seek from where it is",
                vec![open(4, "a", READ), seek(4, 1, Whence::Set), seek(4, 2, Whence::Cur)],
                vec![],
            ),
            (
                "a file that is gone",
                vec![open(4, "a", MAKE), write(4, 0, "x"), close(4), unlink("a")],
                vec![1],
            ),
            (
                "… but for a link",
                vec![open(4, "a", MAKE), write(4, 0, "x"), close(4), link("a", "b"), unlink("a")],
                vec![],
            ),
            (
                "… that is open still",
                vec![open(4, "a", MAKE), write(4, 0, "x"), close(4), open(4, "./a", READ), unlink("a")],
                vec![],
            ),
            (
                "… under another name",
                vec![open(4, "a", MAKE), write(4, 0, "x"), close(4), rename("a", "b"), unlink("a")],
                vec![],
            ),
            (
                "a file written anew",
                vec![
                    open(4, "a", MAKE),
                    write(4, 0, "x"),
                    close(4),
                    open(4, "a", truncate),
                    write(4, 0, "y"),
                ],
                vec![0, 1, 2],
            ),
            (
                "… that was in another one's way",
                vec![
                    open(5, "b", READ),
                    open(4, "a", MAKE),
                    dup(4, 5),
                    close(4),
                    close(5),
                    open(4, "a", truncate),
                ],
                vec![],
            ),
            (
                "… that was opened by another way and written",
                vec![
                    open(4, "a", MAKE),
                    close(4),
                    open(4, "./a", READ),
                    write(4, 0, "x"),
                    close(4),
                    open(4, "a", truncate),
                ],
                vec![],
            ),
            (
                "… that has another name",
                vec![open(4, "new", MAKE), close(4), rename("new", "a"), open(4, "a", truncate)],
                vec![],
            ),
            (
                "… that is read still",
                vec![
                    open(4, "a", MAKE),
                    write(4, 0, "x"),
                    close(4),
                    open(5, "a", READ),
                    open(4, "a", truncate),
                ],
                vec![],
            ),
            (
                "a file replaced",
                vec![
                    open(4, "a", MAKE),
                    write(4, 0, "x"),
                    close(4),
                    open(4, "new", MAKE),
                    write(4, 0, "y"),
                    close(4),
                    rename("new", "a"),
                ],
                vec![1],
            ),
            (
                "a path that is another one now",
                vec![
                    open(4, "a", MAKE),
                    write(4, 0, "x"),
                    close(4),
                    JournalEntry::ChangeDirectoryV1 { path: "/other".into() },
                    unlink("a"),
                ],
                vec![],
            ),
            (
                "what an epoll watches",
                vec![
                    JournalEntry::EpollCreateV1 { fd: 4 },
                    JournalEntry::CreatePipeV1 { read_fd: 5, write_fd: 6 },
                    JournalEntry::EpollCtlV1 {
                        epfd: 4,
                        op: wasmer_wasix_types::wasi::EpollCtl::Add,
                        fd: 5,
                        event: None,
                    },
                    close(5),
                    close(6),
                ],
                vec![1, 2, 3, 4],
            ),
        ];
        for (what, entries, expected) in cases {
            assert_eq!(superseded(entries), expected, "{what}");
        }
    }

    #[test]
    fn entries_of_a_process_that_does_the_same_all_day_do_not_grow() {
        let mut entries = Entries::default();
        let mut lengths = Vec::new();
        for _ in 0..100 {
            entries.push(open(4, "state", Oflags::CREATE | Oflags::TRUNC));
            entries.push(write(4, 0, "all of it"));
            entries.push(close(4));
            entries.push(open(5, "input", READ));
            entries.push(seek(5, 100, Whence::Set));
            entries.push(close(5));
            entries.push(write(1, 0, "a line"));
            entries.mark();
            lengths.push(entries.list.len());
        }
        assert_eq!(lengths[99], lengths[1], "{lengths:?}");
    }

    #[test]
    fn of_a_life_that_ended_without_a_mark_what_was_put_off_is_left_out() {
        let mut entries = Entries::default();
        entries.push(open(4, "a", MAKE));
        entries.mark();
        entries.push(write(4, 0, "x"));
        entries.push(JournalEntry::CreatePipeV1 { read_fd: 5, write_fd: 6 });
        entries.push(open(7, "b", MAKE));
        entries.abandon();
        let found: Vec<_> = entries.iter().cloned().collect();
        assert_eq!(found, [open(4, "a", MAKE), write(4, 0, "x"), open(7, "b", MAKE)]);
    }
}
