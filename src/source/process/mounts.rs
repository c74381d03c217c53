//! The mount table, `/proc/PID/mountinfo`. It gives the type of a file system without a request to
//! that file system.
//!
//! ```text
//! 36 35 98:0 /inside /mount/point rw,noatime master:1 - ext3 /dev/root rw,errors=continue
//!       device       mount point                      - type
//! ```

/// How the files of a file system can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileSystem {
    /// Files in memory (tmpfs). The reported holes are right.
    Memory,
    /// Huge pages: reading a hole of such a file returns zeros and does not fill it.
    HugePages,
    /// On a disk. The reported holes are right, even for data that is still in memory only.
    DiskWithHoles,
    /// On a disk: the whole file is read.
    Disk,
    /// Layers of other file systems: a mapping may show a file as it was before a write to it.
    Overlay,
    /// A server provides it, and may not respond.
    Server,
    /// No files that can be read outside a mapping: proc, sysfs, drivers, unknown types.
    Other,
}

const SERVERS: [&[u8]; 19] = [
    b"fuse",
    b"fuseblk",
    b"virtiofs",
    b"9p",
    b"nfs",
    b"nfs4",
    b"cifs",
    b"smb3",
    b"smbfs",
    b"ncpfs",
    b"ceph",
    b"afs",
    b"coda",
    b"lustre",
    b"orangefs",
    b"pvfs2",
    b"gpfs",
    b"vboxsf",
    b"autofs",
];
const DISKS_WITH_HOLES: [&[u8]; 7] = [b"ext2", b"ext3", b"ext4", b"xfs", b"btrfs", b"f2fs", b"bcachefs"];
const DISKS: [&[u8]; 20] = [
    b"squashfs",
    b"erofs",
    b"iso9660",
    b"udf",
    b"vfat",
    b"msdos",
    b"exfat",
    b"ntfs3",
    b"ntfs",
    b"hfs",
    b"hfsplus",
    b"zfs",
    b"jfs",
    b"reiserfs",
    b"nilfs2",
    b"minix",
    b"cramfs",
    b"romfs",
    b"ubifs",
    b"jffs2",
];

impl FileSystem {
    fn of_type(name: &[u8]) -> FileSystem {
        match name {
            // `rootfs` and `ramfs` may fill holes when they are read; the magic number of the file
            // system shows this.
            b"tmpfs" | b"devtmpfs" | b"rootfs" | b"ramfs" => FileSystem::Memory,
            b"hugetlbfs" => FileSystem::HugePages,
            b"overlay" => FileSystem::Overlay,
            _ if SERVERS.contains(&name) || name.starts_with(b"fuse.") => FileSystem::Server,
            _ if DISKS_WITH_HOLES.contains(&name) => FileSystem::DiskWithHoles,
            _ if DISKS.contains(&name) => FileSystem::Disk,
            _ => FileSystem::Other,
        }
    }
}

/// The mount table.
#[derive(Debug, Default)]
pub(super) struct Mounts {
    mounts: Vec<Mount>,
}

#[derive(Debug)]
struct Mount {
    device: (u32, u32),
    point: Vec<u8>,
    file_system: FileSystem,
}

impl Mounts {
    /// Parses such a file. A line of another form is ignored.
    pub(super) fn parse(mountinfo: &[u8]) -> Mounts {
        Mounts { mounts: mountinfo.split(|byte| *byte == b'\n').filter_map(parse_line).collect() }
    }

    /// The type of the file system with this device, if it is mounted.
    pub(super) fn file_system(&self, device: (u32, u32)) -> Option<FileSystem> {
        self.mounts.iter().find(|mount| mount.device == device).map(|mount| mount.file_system)
    }

    /// Whether looking up this path, which begins with a slash, sends no request to a server.
    pub(super) fn asks_no_server(&self, path: &[u8]) -> bool {
        let is_on_the_way = |point: &[u8]| {
            let point = point.strip_suffix(b"/").unwrap_or(point);
            path.strip_prefix(point).is_some_and(|rest| rest.first() == Some(&b'/'))
        };
        let on_the_way = self.mounts.iter().filter(|mount| is_on_the_way(&mount.point));
        on_the_way
            .into_iter()
            .all(|mount| !matches!(mount.file_system, FileSystem::Server | FileSystem::Other))
    }
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|byte| *byte == b' ');
    let device = str::from_utf8(words.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let point = unescape(words.nth(1)?);
    // A dash ends any number of optional fields.
    let kind = words.skip_while(|word| *word != b"-").nth(1)?;
    Some(Mount {
        device: (major.parse().ok()?, minor.parse().ok()?),
        point,
        file_system: FileSystem::of_type(kind),
    })
}

/// Blanks, newlines and backslashes appear as three octal digits.
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((first, after)) = rest.split_first() {
        let digits =
            after.get(..3).filter(|_| *first == b'\\').and_then(|digits| str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(byte);
                rest = &after[3..];
            }
            None => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_told_by_their_device_and_servers_on_the_way_to_a_file() {
        let mounts = Mounts::parse(
            b"21 1 254:0 / / rw,relatime - ext4 /dev/root rw\n\
              30 21 0:26 / /dev/shm rw shared:4 master:1 - tmpfs tmpfs rw\n\
              31 21 0:40 / /mnt/a\\040b rw - fuse.sshfs host: rw\n\
              32 31 254:1 / /mnt/a\\040b/disk rw - xfs /dev/b rw\n\
              33 21 0:5 / /proc rw - proc proc rw\nnonsense\n",
        );
        let found = [(254, 0), (0, 26), (0, 40), (254, 1), (0, 5), (0, 99)].map(|it| mounts.file_system(it));
        use FileSystem::*;
        let expected = [DiskWithHoles, Memory, Server, DiskWithHoles, Other].map(Some);
        assert_eq!((&found[..5], found[5]), (&expected[..], None));
        for (path, asks_none) in [
            ("/usr/lib/x", true),
            ("/dev/shm/x", true),
            ("/mnt/a b/x", false),
            ("/mnt/a b/disk/x", false),
            ("/mnt/a bc/x", true),
            ("/proc/1/exe", false),
        ] {
            assert_eq!(mounts.asks_no_server(path.as_bytes()), asks_none, "{path}");
        }
    }
}
