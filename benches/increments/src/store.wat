;; A key-value store with a log, as in the memory of a small server: a hash table with chains, an
;; allocator with free lists by size, values of text, and a ring buffer of log lines.
;;
;;      0  counters: requests, gets, sets, removals, bytes in use, log position
;;   1 Ki  64 words of 16 bytes that values and log lines are made of
;;   4 Ki  heads of the free lists, one for each multiple of 16 bytes
;;   8 Ki  the log, 64 KiB
;; 128 Ki  65,536 buckets
;; 512 Ki  nodes: next, key, length, hits, last request, value
(module
  (memory (export "memory") 16)
  (global $random (mut i64) (i64.const 0x9E3779B97F4A7C15))
  (global $top (mut i32) (i32.const 524288))
  (global $records (mut i32) (i32.const 1))

  (data (i32.const 1024)
    "account         address         amount          balance         basket          billing         "
    "cancelled       category        checkout        city            colour          confirmed       "
    "country         created         currency        customer        delivered       delivery        "
    "description     discount        email           expired         failed          first           "
    "gift            group           height          history         image           invoice         "
    "item            label           language        last            length          locale          "
    "name            note            number          order           paid            pending         "
    "phone           postcode        price           product         quantity        refund          "
    "region          returned        review          sale            session         shipped         "
    "size            state           status          stock           street          tax             "
    "total           updated         user            weight          ")

  (func $add (param $counter i32) (param $amount i32)
    (i32.store (local.get $counter) (i32.add (i32.load (local.get $counter)) (local.get $amount))))

  ;; A number below $below. xorshift64.
  (func $pick (param $below i32) (result i32)
    (global.set $random (i64.xor (global.get $random) (i64.shl (global.get $random) (i64.const 13))))
    (global.set $random (i64.xor (global.get $random) (i64.shr_u (global.get $random) (i64.const 7))))
    (global.set $random (i64.xor (global.get $random) (i64.shl (global.get $random) (i64.const 17))))
    (i32.rem_u (i32.wrap_i64 (i64.shr_u (global.get $random) (i64.const 33))) (local.get $below)))

  ;; A key. Some are drawn far more often than others, and their places are random.
  (func $pick_key (result i32)
    (local $rank i64)
    (local.set $rank (i64.div_u
      (i64.mul (i64.extend_i32_u (call $pick (global.get $records))) (i64.extend_i32_u (call $pick (global.get $records))))
      (i64.extend_i32_u (global.get $records))))
    (i32.wrap_i64 (i64.rem_u (i64.mul (local.get $rank) (i64.const 7919)) (i64.extend_i32_u (global.get $records)))))

  (func $bucket (param $key i32) (result i32)
    (i32.add (i32.const 131072)
      (i32.shl (i32.shr_u (i32.mul (local.get $key) (i32.const 0x9E3779B1)) (i32.const 16)) (i32.const 2))))

  ;; How many bytes a node with a value of this length takes.
  (func $node_bytes (param $length i32) (result i32)
    (i32.and (i32.add (local.get $length) (i32.const 35)) (i32.const -16)))

  (func $free_list (param $bytes i32) (result i32)
    (i32.add (i32.const 4096) (i32.shr_u (local.get $bytes) (i32.const 2))))

  (func $allocate (param $bytes i32) (result i32)
    (local $node i32)
    (call $add (i32.const 16) (local.get $bytes))
    (local.set $node (i32.load (call $free_list (local.get $bytes))))
    (if (local.get $node) (then
      (i32.store (call $free_list (local.get $bytes)) (i32.load (local.get $node)))
      (return (local.get $node))))
    (local.set $node (global.get $top))
    (global.set $top (i32.add (global.get $top) (local.get $bytes)))
    (if (i32.gt_u (global.get $top) (i32.shl (memory.size) (i32.const 16))) (then
      (if (i32.lt_s (memory.grow (i32.const 16)) (i32.const 0)) (then unreachable))))
    (local.get $node))

  (func $free (param $node i32)
    (local $bytes i32)
    (local.set $bytes (call $node_bytes (i32.load offset=8 (local.get $node))))
    (call $add (i32.const 16) (i32.sub (i32.const 0) (local.get $bytes)))
    (i32.store (local.get $node) (i32.load (call $free_list (local.get $bytes))))
    (i32.store (call $free_list (local.get $bytes)) (local.get $node)))

  ;; The address of the pointer to the node with this key, or of the null that ends its chain.
  (func $find (param $key i32) (result i32)
    (local $link i32) (local $node i32)
    (local.set $link (call $bucket (local.get $key)))
    (loop $next
      (local.set $node (i32.load (local.get $link)))
      (if (i32.eqz (local.get $node)) (then (return (local.get $link))))
      (if (i32.eq (i32.load offset=4 (local.get $node)) (local.get $key)) (then (return (local.get $link))))
      (local.set $link (local.get $node))
      (br $next))
    unreachable)

  ;; Writes words from $to up to $end.
  (func $write_words (param $to i32) (param $end i32)
    (loop $next
      (if (i32.lt_u (i32.add (local.get $to) (i32.const 16)) (local.get $end)) (then
        (memory.copy (local.get $to) (i32.add (i32.const 1024) (i32.shl (call $pick (i32.const 64)) (i32.const 4))) (i32.const 10))
        (i32.store8 offset=10 (local.get $to) (i32.add (i32.const 48) (call $pick (i32.const 10))))
        (i32.store8 offset=11 (local.get $to) (i32.const 32))
        (local.set $to (i32.add (local.get $to) (i32.const 12)))
        (br $next))))
    (memory.fill (local.get $to) (i32.const 46) (i32.sub (local.get $end) (local.get $to))))

  (func $set (param $key i32) (param $length i32)
    (local $link i32) (local $node i32)
    (call $add (i32.const 8) (i32.const 1))
    (local.set $link (call $find (local.get $key)))
    (local.set $node (i32.load (local.get $link)))
    (if (local.get $node) (then
      (if (i32.ne (call $node_bytes (i32.load offset=8 (local.get $node))) (call $node_bytes (local.get $length))) (then
        (i32.store (local.get $link) (i32.load (local.get $node)))
        (call $free (local.get $node))
        (local.set $node (i32.const 0))))))
    (if (i32.eqz (local.get $node)) (then
      (local.set $node (call $allocate (call $node_bytes (local.get $length))))
      (local.set $link (call $bucket (local.get $key)))
      (i32.store (local.get $node) (i32.load (local.get $link)))
      (i32.store (local.get $link) (local.get $node))
      (i32.store offset=4 (local.get $node) (local.get $key))
      (i32.store offset=12 (local.get $node) (i32.const 0))))
    (i32.store offset=8 (local.get $node) (local.get $length))
    (i32.store offset=16 (local.get $node) (i32.load (i32.const 0)))
    (call $write_words (i32.add (local.get $node) (i32.const 20))
      (i32.add (local.get $node) (i32.add (i32.const 20) (local.get $length)))))

  (func $get (param $key i32)
    (local $node i32)
    (call $add (i32.const 4) (i32.const 1))
    (local.set $node (i32.load (call $find (local.get $key))))
    (if (local.get $node) (then
      (i32.store offset=12 (local.get $node) (i32.add (i32.load offset=12 (local.get $node)) (i32.const 1)))
      (i32.store offset=16 (local.get $node) (i32.load (i32.const 0))))))

  (func $remove (param $key i32)
    (local $link i32) (local $node i32)
    (call $add (i32.const 12) (i32.const 1))
    (local.set $link (call $find (local.get $key)))
    (local.set $node (i32.load (local.get $link)))
    (if (local.get $node) (then
      (i32.store (local.get $link) (i32.load (local.get $node)))
      (call $free (local.get $node)))))

  ;; Writes 64 bytes into the ring.
  (func $log (param $key i32) (param $verb i32)
    (local $line i32)
    (local.set $line (i32.add (i32.const 8192) (i32.and (i32.load (i32.const 20)) (i32.const 65535))))
    (call $add (i32.const 20) (i32.const 64))
    (i32.store (local.get $line) (i32.load (i32.const 0)))
    (i32.store offset=4 (local.get $line) (local.get $key))
    (i32.store offset=8 (local.get $line) (local.get $verb))
    (i32.store offset=12 (local.get $line) (i32.const 0))
    (call $write_words (i32.add (local.get $line) (i32.const 16)) (i32.add (local.get $line) (i32.const 64))))

  (func (export "fill") (param $records i32)
    (local $key i32)
    (global.set $records (local.get $records))
    (loop $next
      (call $set (local.get $key) (i32.add (i32.const 32) (call $pick (i32.const 192))))
      (local.set $key (i32.add (local.get $key) (i32.const 1)))
      (br_if $next (i32.lt_u (local.get $key) (local.get $records)))))

  ;; Of ten requests six read, three write and one removes a key. Every tenth request is logged.
  (func (export "request") (param $operations i32)
    (local $key i32) (local $verb i32)
    (call $add (i32.const 0) (i32.const 1))
    (loop $next
      (local.set $key (call $pick_key))
      (local.set $verb (call $pick (i32.const 10)))
      (if (i32.lt_u (local.get $verb) (i32.const 6))
        (then (call $get (local.get $key)))
        (else (if (i32.lt_u (local.get $verb) (i32.const 9))
          (then (call $set (local.get $key) (i32.add (i32.const 32) (call $pick (i32.const 192)))))
          (else (call $remove (local.get $key))))))
      (if (i32.eqz (call $pick (i32.const 10))) (then (call $log (local.get $key) (local.get $verb))))
      (local.set $operations (i32.sub (local.get $operations) (i32.const 1)))
      (br_if $next (local.get $operations)))))
