//! Real servers with clients, rolled back in place.
//!
//! A connection belongs to the kernel and stays. What a client had sent and the server had read is
//! lost with the rollback, and the server may repeat a reply. The clients here handle that, as a
//! user's clients must. They check the server's data: it must be that of one moment, and that
//! moment must be the captured one.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::rollback::Vault;
use super::runtimes::{AT_MOST, capture, rollback, tries};
use crate::needs::needs;

/// Nothing takes this long, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server, which is killed when the test ends.
struct Server {
    child: Child,
    end_by: Signal,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.child), self.end_by);
        let _ = self.child.wait();
    }
}

#[track_caller]
fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        match look() {
            Some(found) => return found,
            None => assert!(begun.elapsed() < PATIENCE, "{what}: waited {PATIENCE:?} for it"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

// ---- Redis --------------------------------------------------------------------------------------

/// How many records the writer changes in turn. Write number N sets record N modulo this to N.
const RECORDS: u64 = 1000;

/// One write. Redis runs a script as one step.
const WRITE: &str = "local n = redis.call('INCR', 'n') redis.call('HSET', 'r' .. n % 1000, 'n', n) return n";

struct RedisClient(BufReader<UnixStream>);

impl RedisClient {
    fn connect(socket: &Path) -> io::Result<RedisClient> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(3)))?;
        Ok(RedisClient(BufReader::new(stream)))
    }

    fn send(&mut self, words: &[&str]) -> io::Result<()> {
        let parts = words.iter().map(|word| format!("${}\r\n{word}\r\n", word.len()));
        let command = format!("*{}\r\n{}", words.len(), parts.collect::<String>());
        self.0.get_mut().write_all(command.as_bytes())
    }

    /// A number, which Redis may send as an integer or as text; zero for a missing value.
    fn number(&mut self) -> io::Result<u64> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        match line.trim_end() {
            "$-1" => return Ok(0),
            length if length.starts_with('$') => {
                line.clear();
                self.0.read_line(&mut line)?;
            }
            _ => {}
        }
        let number = line.trim_end().trim_start_matches(':').parse();
        number.map_err(|_| io::Error::other(format!("no number: {line:?}")))
    }

    fn ask(&mut self, words: &[&str]) -> u64 {
        self.send(words).unwrap();
        self.number().unwrap()
    }
}

/// A client that writes all the time, and the numbers of the writes that the server has confirmed.
struct Writer {
    numbers: Arc<Mutex<Vec<u64>>>,
    ends: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Writer {
    fn start(mut client: RedisClient) -> Writer {
        let (numbers, ends) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (for_thread, until) = (Arc::clone(&numbers), Arc::clone(&ends));
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                client.send(&["EVAL", WRITE, "0"]).unwrap();
                match client.number() {
                    Ok(number) => for_thread.lock().unwrap().push(number),
                    // The server had read the request when it was rolled back. The client sends it
                    // again.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => panic!("{error}"),
                }
            }
        });
        Writer { numbers, ends, thread: Some(thread) }
    }

    fn numbers(&self) -> Vec<u64> {
        self.numbers.lock().unwrap().clone()
    }

    #[track_caller]
    fn wait_for_more(&self, count: usize) {
        let wanted = self.numbers().len() + count;
        wait_for("answers of the server", || (self.numbers().len() >= wanted).then_some(()));
    }

    fn end(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

#[test]
fn a_redis_that_is_written_during_a_rollback_has_the_data_of_the_captured_moment() {
    if !needs(&["redis-server"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let mut command = Command::new("redis-server");
    command
        .args(["--port", "0", "--save", "", "--unixsocket"])
        .arg(&socket)
        .arg("--dir")
        .arg(directory.path());
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let server = Server { child, end_by: Signal::KILL };
    let pid = server.child.id().to_string();
    let connect = || wait_for("redis", || RedisClient::connect(&socket).ok());
    let mut reader = connect();
    for record in 0..5000 {
        reader.ask(&["HSET", &format!("other{record}"), "text", &"x".repeat(record % 300)]);
    }

    for _ in 0..RECORDS {
        reader.ask(&["EVAL", WRITE, "0"]);
    }

    let vault = Vault::new();
    let mut right = 0;
    let tries = tries();
    for _ in 0..tries.unwrap_or(AT_MOST) {
        let mut writer = Writer::start(connect());
        writer.wait_for_more(300);
        let then = writer.numbers().len();
        let id = capture(&vault, &pid);
        let last = *writer.numbers().last().unwrap();
        writer.wait_for_more(500);
        let refusal = rollback(&vault, &id, &pid);
        writer.wait_for_more(500);
        writer.end();

        let numbers = writer.numbers();
        let expected = numbers[then - 1]..=last + 2;
        let steps = numbers[then - 1..].windows(2).filter(|pair| pair[1] != pair[0] + 1);
        let steps: Vec<&[u64]> = steps.collect();
        match (&refusal, &steps[..]) {
            (Some(_), []) => {}
            (None, [step]) if expected.contains(&step[1]) => right += 1,
            (refusal, steps) => panic!("captured at write {expected:?}, {refusal:?}: {steps:?}"),
        }
        let is_as_it_should = |client: &mut RedisClient| {
            let count = client.ask(&["GET", "n"]);
            // There may be a reply in flight that no client waits for.
            let known = *numbers.last().unwrap();
            assert!(count == known || count == known + 1, "{count} is not {known}");
            (0..RECORDS).for_each(|at| client.send(&["HGET", &format!("r{at}"), "n"]).unwrap());
            for at in 0..RECORDS {
                let newest = count - (count + RECORDS - at) % RECORDS;
                assert_eq!(client.number().unwrap(), newest, "record {at} at write {count}");
            }
            assert_eq!(client.ask(&["DBSIZE"]), 5000 + RECORDS + 1);
        };
        // A client that was connected all the time, and a new one.
        is_as_it_should(&mut reader);
        is_as_it_should(&mut connect());
        if tries.is_none() && right > 0 {
            break;
        }
    }
    println!("Redis: {right} went on right");
    assert!(right > 0, "all are refused");
}

// ---- PostgreSQL ---------------------------------------------------------------------------------

/// A server with its data, and the user that it must run as.
struct Postgres {
    directory: tempfile::TempDir,
    as_user: Vec<&'static str>,
    _server: Server,
}

/// The directory of its programs, which may not be in the path.
fn postgres_programs() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let places = versions.map(|version| version.unwrap().path().join("bin"));
    places.filter(|place| place.join("postgres").is_file()).max()
}

impl Postgres {
    fn start(programs: &Path) -> Postgres {
        let directory = tempfile::tempdir().unwrap();
        let is_root = rustix::process::geteuid().is_root();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let as_user = match is_root {
            true => vec!["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"],
            false => vec!["env"],
        };
        let command = |program: &str| {
            let mut command = Command::new(as_user[0]);
            command.args(&as_user[1..]).arg(programs.join(program)).current_dir("/");
            command.arg("-D").arg(directory.path().join("data"));
            command.stdin(Stdio::null()).stdout(Stdio::null());
            command
        };
        let initialised = command("initdb").args(["-A", "trust", "-U", "postgres", "--no-sync"]).status();
        assert!(initialised.unwrap().success());
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let mut postgres = command("postgres");
        postgres.args(["-c", "listen_addresses=", "-c", "fsync=off", "-c", "autovacuum=off"]);
        postgres.arg("-c").arg(format!("unix_socket_directories={}", directory.path().display()));
        let child = postgres.stderr(log).spawn().unwrap();
        // Stops immediately, with its backends.
        let server = Server { child, end_by: Signal::QUIT };
        let postgres = Postgres { directory, as_user, _server: server };
        wait_for("the server", || {
            let mut psql = postgres.psql();
            let asked = psql.args(["-c", "select 1"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
            asked.unwrap().success().then_some(())
        });
        postgres
    }

    fn psql(&self) -> Command {
        let mut command = Command::new(self.as_user[0]);
        command.args(&self.as_user[1..]).args(["psql", "-X", "-q", "-A", "-t", "-U", "postgres", "-h"]);
        command.arg(self.directory.path()).current_dir("/");
        command
    }

    fn connect(&self) -> Session {
        let mut command = self.psql();
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Session { child, output }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }
}

/// A `psql` session.
struct Session {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Session {
    /// Runs statements, the last of which prints one line.
    fn ask(&mut self, statements: &str) -> String {
        self.child.stdin.as_mut().unwrap().write_all(format!("{statements};\n").as_bytes()).unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_backend_of_postgresql_is_refused_when_its_server_has_gone_on_and_nothing_is_lost() {
    let programs = postgres_programs();
    if !needs(if programs.is_some() { &["psql", "setpriv"] } else { &["postgres"] }) {
        return;
    }
    let programs = programs.unwrap_or_default();
    let postgres = Postgres::start(&programs);
    let (mut session, mut other) = (postgres.connect(), postgres.connect());
    let backend = session.ask("create table t (n int); insert into t values (1); select pg_backend_pid()");
    let vault = Vault::new();
    let mut expected = 1;
    for changed in ["by itself", "by another session", "into another file"] {
        // In the middle of a transaction, which has ended when the server is rolled back.
        assert_eq!(
            session.ask("begin; insert into t values (2); select count(*) from t"),
            (expected + 1).to_string()
        );
        let id = capture(&vault, &backend);
        assert_eq!(session.ask("commit; select count(*) from t"), (expected + 1).to_string());
        expected += 1;
        match changed {
            "by another session" => {
                expected += 1;
                assert_eq!(
                    other.ask("insert into t values (3); select count(*) from t"),
                    expected.to_string()
                );
            }
            "into another file" => {
                let column =
                    other.ask("alter table t alter n type bigint; select pg_typeof(n) from t limit 1");
                assert_eq!(column, "bigint");
            }
            _ => {}
        }
        let why = rollback(&vault, &id, &backend).expect("it would have lost what is committed");
        assert!(why.contains("differs, and ") && why.contains("--leave-shared-memory"), "{changed}: {why}");
        for session in [&mut session, &mut other, &mut postgres.connect()] {
            expected += 1;
            let count = session.ask("insert into t values (4); select count(*) from t");
            assert_eq!(count, expected.to_string(), "{changed}");
        }
    }
    let log = postgres.log();
    assert!(!log.contains("PANIC") && !log.contains("terminated by signal"), "{log}");
}
