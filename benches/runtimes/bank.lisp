;; Two threads that move money between accounts and make garbage. Each collection stops the other
;; thread with a signal.
(defvar *accounts* (make-array 1000))
(dotimes (i 1000) (setf (aref *accounts* i) (list 100)))
(defvar *lock* (sb-thread:make-mutex))
(defvar *garbage* (make-array 64 :initial-element nil))
(defun wrong (what) (format t "WRONG ~a~%" what) (finish-output) (sb-ext:exit :code 3 :abort t))
(defun work (seed)
  (let ((draw (sb-ext:seed-random-state seed)))
    (handler-case
        (loop
          (sb-thread:with-mutex (*lock*)
            (dotimes (i 50)
              (let ((a (random 1000 draw)) (b (random 1000 draw)))
                (setf (aref *accounts* a) (list (1- (car (aref *accounts* a)))))
                (setf (aref *accounts* b) (list (1+ (car (aref *accounts* b))))))))
          (dotimes (i 100)
            (setf (aref *garbage* (random 64 draw)) (make-array (random 5000 draw)))))
      (error (e) (wrong e)))))
(dotimes (i 2) (let ((seed i)) (sb-thread:make-thread (lambda () (work seed)))))
(loop for tick from 1 do
  (sleep 0.1)
  (let ((sum 0))
    (sb-thread:with-mutex (*lock*) (loop for a across *accounts* do (incf sum (car a))))
    (unless (= sum 100000) (wrong "sum")))
  (format t "tick ~a~%" tick)
  (finish-output))
