//! Waiting, what is left behind and who may have written a copy; `tests/packed_copy.rs` has whole models.

use super::{super::Store, *};

fn place(folder: &Path) -> Place {
    Place { path: folder.join("a.model-0123456789abcdef.packed"), key: [7; 32] }
}

/// Matrices of some sizes, none of them a multiple of anything.
fn matrices() -> Vec<Vec<u8>> {
    [0, 1, 100, 3 * PIECE + 17]
        .map(|length: usize| (0..length).map(|i| (i * 7 % 251) as u8).collect())
        .to_vec()
}

fn write(writer: &mut Writer, pool: &mut Pool) {
    for (i, bytes) in matrices().iter().enumerate() {
        writer.append(&format!("matrix {i}"), bytes, pool).unwrap();
    }
}

fn writer(place: &Place) -> Writer {
    let Ok(Found::Nothing(writer)) = place.find(None) else { panic!("there is a copy") };
    writer
}

fn reader(place: &Place) -> Reader {
    let Ok(Found::Copy(reader)) = place.find(None) else { panic!("there is no copy") };
    reader
}

#[test]
fn what_is_written_is_read_in_the_same_order_only() {
    let folder = tempfile::tempdir().unwrap();
    let (place, mut pool) = (place(folder.path()), Pool::start(2).unwrap());
    let mut writer = writer(&place);
    write(&mut writer, &mut pool);
    writer.finish().unwrap();
    let mut whole = reader(&place);
    for (i, bytes) in matrices().iter().enumerate() {
        let read = whole.next(&format!("matrix {i}"), bytes.len(), &mut pool).unwrap();
        assert!(read.as_slice() == bytes && (read.as_slice().as_ptr() as usize).is_multiple_of(ALIGN));
    }
    assert!(whole.next("matrix 4", 1, &mut pool).is_err(), "there are no more");
    let wrong: [(&str, usize); 3] = [("matrix 1", 0), ("matrix 0", 1), ("matrix 0", usize::MAX)];
    for (what, length) in wrong {
        assert!(reader(&place).next(what, length, &mut pool).is_err(), "{what}, {length}");
    }
}

#[test]
fn of_writers_only_the_last_leaves_anything() {
    let folder = tempfile::tempdir().unwrap();
    let (place, mut pool) = (place(folder.path()), Pool::start(1).unwrap());
    let left = || {
        let mut names: Vec<_> = files_beside(&place.path)
            .map(|path| path.extension().unwrap().to_string_lossy().into_owned())
            .collect();
        names.sort_unstable();
        names
    };
    // As a killed process leaves it, beside what is another's.
    fs::write(folder.path().join("a.model-0123456789abcdef.77-1.part"), "begun").unwrap();
    fs::write(folder.path().join("b-0123456789abcdef.77-1.part"), "begun").unwrap();
    let mut given_up = writer(&place);
    write(&mut given_up, &mut pool);
    assert_eq!(left(), ["lock", "part", "part"]);
    drop(given_up);
    assert_eq!(left(), ["lock", "part"]);
    let mut finished = writer(&place);
    write(&mut finished, &mut pool);
    finished.finish().unwrap();
    assert_eq!(left(), ["lock", "packed", "part"]);
}

#[test]
fn a_lock_that_keeps_nobody_out_harms_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (place, mut pool) = (place(folder.path()), Pool::start(1).unwrap());
    let mut first = writer(&place);
    first.append("matrix 0", &matrices()[0], &mut pool).unwrap();
    // Gone with its file, as for processes on hosts that do not share locks.
    fs::remove_file(place.path.with_extension("lock")).unwrap();
    let mut second = writer(&place);
    write(&mut second, &mut pool);
    second.finish().unwrap();
    for (i, bytes) in matrices().iter().enumerate().skip(1) {
        first.append(&format!("matrix {i}"), bytes, &mut pool).unwrap();
    }
    first.finish().unwrap_err();
    assert!(reader(&place).next("matrix 0", 0, &mut pool).is_ok());
}

#[test]
fn a_stuck_writer_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let (place, stalled) = (place(folder.path()), Duration::from_millis(300));
    let held = place.lock(stalled).unwrap();
    let begun = Instant::now();
    thread::scope(|scope| {
        // As long as it goes on, it is no matter how long it takes.
        scope.spawn(|| {
            for _ in 0..10 {
                thread::sleep(Duration::from_millis(100));
                held.set_modified(SystemTime::now()).unwrap();
            }
        });
        let error = place.lock(stalled).unwrap_err();
        assert!(
            error.kind() == io::ErrorKind::TimedOut && begun.elapsed() > Duration::from_secs(1),
            "{error}"
        );
    });
    drop(held);
    place.lock(stalled).unwrap();
}

#[test]
fn only_what_is_ours_and_long_unused_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    let day = Duration::from_secs(24 * 3600);
    let name = "m-0123456789abcdef";
    let files = [
        (format!("{name}.packed"), NAME, 31, false),
        (format!("{name}.lock"), "", 31, false),
        (format!("{name}.1-2.part"), "", 31, false),
        ("used-0123456789abcdef.packed".into(), NAME, 29, true),
        ("other-0123456789abcdef.packed".into(), "somebody's", 90, true),
        ("parcel.packed".into(), NAME, 90, true),
        ("yarn.lock".into(), "", 90, true),
        ("film.part".into(), "", 90, true),
        ("model.gguf".into(), NAME, 90, true),
    ];
    for (name, content, days, _) in &files {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.set_modified(SystemTime::now() - *days * day).unwrap();
    }
    remove_unused(&place(folder.path()).path);
    for (name, .., stays) in files {
        assert_eq!(folder.path().join(&name).exists(), stays, "{name}");
    }
}

#[cfg(unix)]
#[test]
fn what_others_can_write_is_not_used() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let (place, mut pool) = (place(folder.path()), Pool::start(1).unwrap());
    let mut writer = writer(&place);
    write(&mut writer, &mut pool);
    writer.finish().unwrap();
    for (mode, used) in [(0o600, true), (0o644, true), (0o664, false), (0o606, false)] {
        fs::set_permissions(&place.path, fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(Reader::open(&place).unwrap().is_some(), used, "{mode:o}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_costs_the_copy_only() {
    let folder = tempfile::tempdir().unwrap();
    let (place, mut pool) = (place(folder.path()), Pool::start(1).unwrap());
    let mut writer = writer(&place);
    writer.file = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut store = Store::from(writer);
    for value in [7, 8] {
        let bytes = store.put("a matrix", 100, &mut pool, &mut |to, _| to.fill(value)).unwrap();
        assert_eq!(bytes.as_slice(), [value; 100]);
        let left: Vec<PathBuf> = files_beside(&place.path).collect();
        assert_eq!(left, [place.path.with_extension("lock")]);
    }
    assert!(!store.finish());
    // Another may try.
    assert!(matches!(place.find(None), Ok(Found::Nothing(_))));
}
