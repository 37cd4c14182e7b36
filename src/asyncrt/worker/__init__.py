"""What runs beside the user's function: standard library and cloudpickle only.

The same program serves every backend. It is packed as one zipapp (``asyncrt.pack``), never
installed. Three kinds of process, so that user code can harm none but its own call:

parent
    Owns the connection, the timers and the results that the client has not acknowledged.
    Single-threaded, runs no user code, does not even import cloudpickle.
server
    Has cloudpickle loaded, forks children, reaps them.
child
    One per slot. Runs calls.
"""
